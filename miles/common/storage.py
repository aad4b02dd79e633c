"""Files and folders by URL (fsspec): a local path, `file://`, `s3://`, `hf://`, `memory://`, …

Credentials come from the environment alone, as each filesystem's own library reads them. Calls
that may fail for a moment are made again (`retry`). Listings that a filesystem remembers are not
trusted.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import fsspec.callbacks

from miles.common import retry, write_guard
from miles.common.file_errors import reading as reading
from miles.common.file_errors import writing as writing
from miles.common.folder_walk import walk
from miles.common.redact import require_no_secret
from miles.errors import MissingFileError, SourceError

MAGIC = re.compile(r"[*?\[]")
"""The signs that make a pattern of a path, where nothing has that very name."""
_COPY_THREADS = 8
_COPY_BYTES = 16 << 20


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the filesystem of a URL, and the path on it.

    Raises:
        SourceError: an unknown protocol, one whose package is not installed, or a URL with a
            password in it.
    """
    require_no_secret(url)
    if url.startswith("/"):
        # Not by fsspec's reading of URLs: a name may hold `::`, which divides URLs there.
        local = fsspec.filesystem("file")
        return local, str(local._strip_protocol(url))
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SourceError(
            f"{url}: cannot be opened ({error}). For s3:// install miles[s3], for hf:// miles[hub]."
        ) from error
    return fs, path


def is_local(url: str) -> bool:
    """Return whether a URL is of this machine's own files."""
    fs, _ = filesystem(url)
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def is_same(url: str, other: str) -> bool:
    """Return whether two URLs are of one file or folder."""
    return place_of(url) == place_of(other)


def is_within(url: str, folder: str) -> bool:
    """Return whether a URL is a folder itself, or lies in it."""
    return f"{place_of(url)}/".startswith(f"{place_of(folder)}/")


def place_of(url: str) -> str:
    """Return the one spelling of a URL, without a slash behind it; of a local one, its path."""
    place = str(Path(filesystem(url)[1]).resolve()) if is_local(url) else url
    return place.rstrip("/")


def require_held(url: str) -> None:
    """Make sure that no other run has taken over the folder that a URL lies in.

    Raises:
        LeaseError: one has.
    """
    if write_guard.is_active():
        write_guard.require(place_of(url))


def join(url: str, *names: str) -> str:
    """Return `url/name/…`, for any protocol."""
    return posixpath.join(url.rstrip("/") or "/", *names)


def info(url: str, max_tries: int | None = None) -> dict[str, Any]:
    """Ask the filesystem about a file or folder, without a cache: `type`, `size`, …

    Args:
        url: of the file or folder.
        max_tries: here and below, of calls that fail for a moment; None: `retry.MAX_TRIES`.

    Raises:
        MissingFileError: nothing is there.
        SourceError: the filesystem cannot be reached, or refuses.
    """
    fs, path = filesystem(url)

    def ask() -> dict[str, Any]:
        fs.invalidate_cache(path)
        answer: dict[str, Any] = fs.info(path)
        return answer

    with reading(url):
        return retry.call(ask, url, max_tries=max_tries)


def exists(url: str) -> bool:
    """Return whether a file or a folder is there."""
    return type_of(url) is not None


def is_folder(url: str) -> bool:
    """Return whether a folder is there."""
    return type_of(url) == "directory"


def type_of(url: str) -> str | None:
    """Return "file", "directory" or None. fsspec's `exists` and `isdir` take an error for a no."""
    try:
        return str(info(url)["type"])
    except MissingFileError:
        return None


def size_of(url: str, answer: dict[str, Any]) -> int:
    """Return a file's size in bytes.

    Args:
        answer: of `info`.

    Raises:
        SourceError: a web server did not tell it.
    """
    if answer.get("size") is None:
        raise SourceError(
            f"{url}: its size is not known, so that no part of it can be asked for. Copy it to a "
            "store"
        )
    return int(answer["size"])


_STAMPS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
"""Keys of `info`, in each filesystem's own words, whose value changes when a file is written."""


def stamp_of(answer: dict[str, Any]) -> str:
    """Return a file's stamp, its entity tag or last change, from an answer of `info` or a listing.

    Returns:
        `key:value`, such as `mtime:1764128555.1`; "" where the filesystem tells nothing of the
        kind.
    """
    for key in _STAMPS:
        if answer.get(key):
            return f"{key}:{answer[key]}".replace('"', "")
    return ""


class Ranges(io.RawIOBase):
    """A file object over something whose byte ranges can be read.

    Args:
        num_bytes: its size.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._at = 0

    def read_range(self, begin: int, end: int) -> bytes:
        """Return bytes [begin, end)."""
        raise NotImplementedError

    def read(self, size: int | None = -1, /) -> bytes:
        end = self._num_bytes if size is None or size < 0 else min(self._at + size, self._num_bytes)
        content = self.read_range(self._at, end)
        self._at += len(content)
        return content

    def readinto(self, buffer: Any, /) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}
        self._at = origins[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class RangeFile(Ranges):
    """A file read by byte ranges, each of them asked for again where it fails or comes short.

    Nothing is kept open or read ahead. So a stream over it continues, after an error, at its byte.

    Args:
        num_bytes: the file's size; None: the filesystem is asked.
    """

    def __init__(self, url: str, num_bytes: int | None = None) -> None:
        self._url = url
        self._fs, self._path = filesystem(url)
        super().__init__(size_of(url, info(url)) if num_bytes is None else num_bytes)

    def read_range(self, begin: int, end: int) -> bytes:
        """Return bytes [begin, end).

        Raises:
            SourceError: the range cannot be read; it names the file.
            MissingFileError: the file is not there.
        """
        if begin >= end:
            return b""

        def read() -> bytes:
            content: bytes = self._fs.cat_file(self._path, start=begin, end=end)
            if len(content) < end - begin:
                raise retry.ShortRead(f"{len(content)} of {end - begin} bytes from byte {begin} on")
            return content

        with reading(self._url):
            content = retry.call(read, self._url)
        if len(content) > end - begin:
            raise SourceError(
                f"{self._url}: asked for {end - begin} bytes, got {len(content)}: the server does "
                "not serve byte ranges. Copy the file to a store that does"
            )
        return content


def read_bytes(url: str, max_tries: int | None = None) -> bytes:
    """Return the content of a file."""
    fs, path = filesystem(url)
    num_bytes = info(url, max_tries).get("size") or 0  # a pipe has none

    def read() -> bytes:
        content: bytes = fs.cat_file(path)
        if len(content) < num_bytes:
            raise retry.ShortRead(f"{len(content)} of {num_bytes} bytes")
        return content

    with reading(url):
        return retry.call(read, url, max_tries=max_tries)


def read_text(url: str, max_tries: int | None = None) -> str:
    """Return the content of a UTF-8 file."""
    with reading(url):
        return read_bytes(url, max_tries).decode("utf-8")


def write_text(url: str, text: str, max_tries: int | None = None) -> None:
    """Write a small file. A local one is replaced in one move: no reader sees half of it."""
    write_bytes(url, text.encode("utf-8"), max_tries)


def write_bytes(url: str, content: bytes, max_tries: int | None = None) -> None:
    """Write a small file, as `write_text` does.

    Raises:
        WriteError: it cannot be written; the error names it.
    """
    require_held(url)
    fs, path = filesystem(url)
    with writing(url):
        if is_local(url):
            _write_locally(Path(path), content)
        else:
            retry.call(lambda: fs.pipe_file(path, content), url, "written", max_tries)


def _write_locally(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may write at once: each has a name of its own.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    finally:
        # An error of removing it would hide the one of writing it.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


Report = Callable[[int], None]
"""A function that is given a number of bytes when they were moved."""
Watch = Callable[[int], contextlib.AbstractContextManager[Report]]
"""A function that is given the bytes to be moved. Its context yields the `Report`."""


def _unwatched(num_bytes: int) -> contextlib.AbstractContextManager[Report]:
    return contextlib.nullcontext(lambda done: None)


@contextlib.contextmanager
def local_folder(
    url: str,
    what: str = "folder",
    is_wanted: Callable[[str], bool] = lambda name: True,
    watch: Watch = _unwatched,
) -> Iterator[Path]:
    """Yield a folder as a local path: itself, or a copy of a remote one that ends with the context.

    Args:
        url: of the folder.
        what: it is, for the error.
        is_wanted: whether a file is copied, by its path in the folder.
        watch: follows the copying.

    Raises:
        SourceError: no such folder.
    """
    fs, path = filesystem(url)
    if not is_folder(url):
        found = "a file, not a folder" if exists(url) else f"no such {what}"
        raise MissingFileError(f"{url}: {found}")
    if is_local(url):
        yield Path(path)
        return

    with temporary_folder("miles-") as staged:
        with reading(url):
            files = walk(fs, path, with_hidden=True, with_links=False).files
            paths = [posixpath.relpath(name, path) for name in files]
        _download(url, list(filter(is_wanted, paths)), staged, watch)
        yield staged


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield an empty folder on this machine, which is removed when the context ends.

    Raises:
        WriteError: none can be made.
    """
    with writing(f"a temporary folder ({tempfile.tempdir or '$TMPDIR, or /tmp'})"):
        folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def _download(url: str, names: Sequence[str], target: Path, watch: Watch) -> None:
    """Copy files of a folder to this machine, several at a time."""

    def num_bytes_of(name: str) -> int:
        return size_of(join(url, name), info(join(url, name)))

    with ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="miles-copy") as pool:
        num_bytes = sum(pool.map(num_bytes_of, names))
        with watch(num_bytes) as report:
            list(pool.map(lambda name: copy_file(join(url, name), target / name, report), names))


def copy_file(url: str, target: Path, report: Report = lambda done: None) -> None:
    """Copy a file to this machine; its folders are created.

    Raises:
        SourceError: it cannot be read.
        WriteError: the copy cannot be written.
    """
    source = RangeFile(url)
    with writing(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            while content := source.read(_COPY_BYTES):
                copy.write(content)
                report(len(content))


def upload_folder(folder: Path, url: str, last: str = "", watch: Watch = _unwatched) -> None:
    """Copy a local folder to a remote URL.

    Args:
        folder: to copy.
        url: where to.
        last: the file that makes it complete; it is copied last.
        watch: follows the copying.
    """
    require_held(url)
    fs, path = filesystem(url)
    files: list[Any] = sorted(file for file in folder.rglob("*") if file.is_file())
    with watch(sum(file.stat().st_size for file in files)) as report:
        for file in sorted(files, key=lambda file: str(file.relative_to(folder)) == last):
            target = posixpath.join(path, file.relative_to(folder).as_posix())
            put = partial(fs.put_file, str(file), target, callback=_Reporting(report))
            with writing(str(fs.unstrip_protocol(target))):
                retry.call(put, join(url, file.name), "written")


class _Reporting(fsspec.callbacks.Callback):
    """Passes on what fsspec reports of its progress."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def relative_update(self, inc: int = 1) -> None:
        self._report(inc)


def names(url: str) -> list[str]:
    """Return the names in a folder, sorted; none where there is no folder."""
    fs, path = filesystem(url)
    if not is_folder(url):
        return []
    with reading(url):
        entries = retry.call(lambda: fs.ls(path, detail=False), url)
    return sorted(
        {str(name).rstrip("/").rsplit("/", 1)[-1] for name in entries}
        - {"", path.rstrip("/").rsplit("/", 1)[-1]}
    )


def remove(url: str, max_tries: int | None = None) -> None:
    """Remove a file or a folder, if it is there.

    Raises:
        WriteError: it cannot be removed; the error names it.
    """
    require_held(url)
    fs, path = filesystem(url)
    with writing(url, "removed"), contextlib.suppress(FileNotFoundError):
        if is_local(url) or not MAGIC.search(path):
            retry.call(lambda: fs.rm(path, recursive=True), url, "removed", max_tries)
            return
        # A store's `rm` takes a name with brackets for a pattern.
        files = (
            walk(fs, path, with_hidden=True, with_links=False).files if is_folder(url) else [path]
        )
        for name in files:
            retry.call(partial(fs.rm_file, name), url, "removed", max_tries)
