"""Where the rows of a data set lie, and in which files a row can be.

    --prompt-data PATH                 one source, named after the file or folder
    --prompt-data NAME PATH NAME PATH  a mixture
    openhermes                         teknium/OpenHermes-2.5 from the hub, or the files given with `source`

Nothing is read here; only the hub is asked which files it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from miles.common import storage
from miles.data.config import RowFormat, SourceConfig
from miles.errors import ConfigError, MilesError, SourceError

_BASE_FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""File suffix -> compression. Parquet compresses inside the file."""
FORMATS: dict[str, str] = _BASE_FORMATS | {
    base + packed: kind
    for base, kind in _BASE_FORMATS.items()
    if kind != "parquet"
    for packed in COMPRESSIONS
}
"""File suffix -> "parquet", "jsonl" or "json". Of the last two the first byte of the file has the last word."""

_FOUND = RowFormat()
"""Shape and columns are found from the first rows."""

OPENHERMES = "teknium/OpenHermes-2.5"
_PARQUET_BRANCH = "refs/convert/parquet"  # kept by the hub beside every data set
_OPENHERMES_ARRAY = "openhermes2_5.json"


def format_of(path: str) -> tuple[str, str | None]:
    """A file's format and compression, from its suffix: `a/b.jsonl.gz` -> ("jsonl", "gzip").

    Raises:
        SourceError: a suffix that is not in `FORMATS`.
    """
    name = path.lower()
    for suffix in sorted(FORMATS, key=len, reverse=True):
        if name.endswith(suffix):
            return FORMATS[suffix], next(
                (kind for end, kind in COMPRESSIONS.items() if name.endswith(end)), None
            )
    raise SourceError(
        f"{path}: what is in it cannot be told; expected a name ending in {', '.join(FORMATS)}"
    )


def openhermes_sources(
    source: str | Sequence[str] | None, revision: str | None = None, format: RowFormat = _FOUND
) -> tuple[SourceConfig, ...]:
    """OpenHermes-2.5, from files of the user's own or from the Hugging Face hub.

    On the hub its Parquet branch is tried first, then the one JSON array that the repository holds. With
    `revision` that revision alone is taken: its Parquet files where it has any, else the array.

    Args:
        source: files, globs or folders; None: the hub.
        revision: branch, tag or commit on the hub; None: what the hub has now.
        format: what the rows look like.

    Raises:
        SourceError: the hub cannot be reached, asks for a login, or has no such revision.
        ConfigError: a revision together with `source`.
    """
    if source is not None:
        if revision is not None:
            raise ConfigError(
                f"revision {revision!r} is one of the hub's; with source= there is none to choose"
            )
        paths = (source,) if isinstance(source, str) else tuple(source)
    else:
        paths = _hub_files((revision,) if revision else (_PARQUET_BRANCH, "main"))
    return (SourceConfig("openhermes", paths, format),)


def _hub_files(revisions: Sequence[str]) -> tuple[str, ...]:
    for revision in revisions:
        url = f"hf://datasets/{OPENHERMES}@{quote(revision, safe='')}"
        try:
            fs, path = storage.filesystem(url)
            fs.info(path)  # raises where find() would quietly answer with nothing
            names = fs.find(path)
        except MilesError as error:
            raise _hub_error(str(error)) from error
        except FileNotFoundError as error:
            if type(error.__cause__).__name__ == "RevisionNotFoundError":
                continue
            raise _hub_error(
                f"the hub asks for a login, or does not have it ({_first_line(error)})"
            ) from error
        # The hub's client raises errors of its HTTP library, which is another one from release to release.
        except Exception as error:
            raise _hub_error(
                f"the Hugging Face hub cannot be reached ({_first_line(error)})"
            ) from error
        parquet = tuple(f"hf://{name}" for name in sorted(names) if name.endswith(".parquet"))
        array = tuple(f"hf://{name}" for name in names if name.endswith("/" + _OPENHERMES_ARRAY))
        if parquet or array:
            return parquet or array
    raise _hub_error(f"nothing to read at revision {' or '.join(revisions)}")


def _hub_error(found: str) -> SourceError:
    return SourceError(
        f"{OPENHERMES}: {found}. Either log in where the network is (HF_TOKEN in the environment), or fetch the "
        f"files elsewhere and name them: --source PATH, or prepare('openhermes', source='PATH'), with PATH a "
        f"file, glob or folder of Parquet, JSON lines, or {_OPENHERMES_ARRAY}"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
