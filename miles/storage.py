"""Paths are fsspec URLs everywhere: a local path, `file://`, `s3://`, `hf://`, `memory://`.

Credentials come from the environment alone, as each filesystem's own library reads them.
"""

from __future__ import annotations

import contextlib
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from miles.errors import MilesError, SourceError


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL and the path on it.

    Raises:
        SourceError: an unknown protocol, or one whose package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SourceError(
            f"{url}: cannot be opened ({error}). For s3:// install miles[s3], for hf:// miles[hub]."
        ) from error
    return fs, path


def is_local(url: str) -> bool:
    fs, _ = filesystem(url)
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def join(url: str, *names: str) -> str:
    """`url/name/…`, whatever the protocol."""
    return posixpath.join(url.rstrip("/") or "/", *names)


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def expand(url: str, suffixes: Sequence[str], default_error: type[MilesError] = SourceError) -> list[str]:
    """The files that a path, a glob or a folder names, sorted, as URLs.

    Args:
        url: a file, a glob (`*`, `?`, `[`), or a folder, whose files with one of `suffixes` are taken
            (its sub-folders too; names that begin with a dot or an underscore are passed over).
        suffixes: such as (".parquet", ".jsonl.gz").

    Raises:
        SourceError: nothing is there.
    """
    fs, path = filesystem(url)
    try:
        if any(character in path for character in "*?["):
            found = [name for name in fs.glob(path) if not fs.isdir(name)]
        elif fs.isdir(path):
            found = [
                name
                for name in fs.find(path)
                if name.endswith(tuple(suffixes))
                and not any(part[:1] in "._" for part in name[len(path) :].strip("/").split("/"))
            ]
        else:
            found = [path] if fs.exists(path) else []
    except PermissionError as error:
        raise default_error(f"{url}: permission denied ({error})") from error
    if not found:
        raise default_error(f"{url}: no such file; nothing with {', '.join(suffixes)} is there")
    return sorted(str(fs.unstrip_protocol(name)) if not is_local(url) else str(name) for name in found)


def read_bytes(url: str) -> bytes:
    fs, path = filesystem(url)
    content: bytes = fs.cat_file(path)
    return content


def read_text(url: str) -> str:
    return read_bytes(url).decode("utf-8")


def write_text(url: str, text: str) -> None:
    """Writes a small file; where the filesystem is local, in one move, so that no reader sees half of it."""
    fs, path = filesystem(url)
    if is_local(url):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    else:
        fs.pipe_file(path, text.encode("utf-8"))


@contextlib.contextmanager
def local_folder(url: str, what: str = "folder") -> Iterator[Path]:
    """A folder as a local path: itself, or, where it is remote, a copy that lasts as long as the context.

    Raises:
        SourceError: no such folder.
    """
    fs, path = filesystem(url)
    if not fs.isdir(path):
        raise SourceError(f"{url}: no such {what}")
    if is_local(url):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="miles-") as staged:
        fs.get(path.rstrip("/") + "/", staged, recursive=True)
        yield Path(staged)


def upload_folder(folder: Path, url: str, last: str) -> None:
    """Copies a local folder to a remote URL; the file `last`, which says that it is complete, goes last."""
    fs, path = filesystem(url)
    files: list[Any] = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: str(file.relative_to(folder)) == last):
        fs.put_file(str(file), posixpath.join(path, file.relative_to(folder).as_posix()))
