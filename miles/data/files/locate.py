"""Paths -> files, and a file's name -> its format.

    data/              the files of a known format in the folder and below
    s3://b/x*.jsonl    the files that match
    a/b.jsonl.gz       format "jsonl", compression "gzip"

No file is opened; the filesystem is only asked which files there are.
"""

from __future__ import annotations

from miles.common import storage
from miles.common.patterns import expand
from miles.errors import SourceError

_COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_TEXTS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}

FORMATS: dict[str, tuple[str, str | None]] = {
    ".parquet": ("parquet", None),
    **{
        text + packed: (format, compression)
        for packed, compression in _COMPRESSIONS.items()
        for text, format in _TEXTS.items()
    },
}
"""Suffix -> format and compression. None ends with another.

Between "jsonl" and "json" the file's first byte decides. Parquet compresses inside the file.
"""


def format_of(path: str) -> tuple[str, str | None]:
    """Return a file's format and compression, from its suffix: `a/b.jsonl.gz` -> ("jsonl", "gzip").

    Raises:
        SourceError: the suffix is not in `FORMATS`.
    """
    for suffix, format_and_compression in FORMATS.items():
        if path.lower().endswith(suffix):
            return format_and_compression
    raise SourceError(
        f"{path}: its name does not say what is in it; expected one ending in {', '.join(FORMATS)}"
    )


def files_of(path: str) -> list[str]:
    """Return the files that a path, glob or folder names, sorted.

    In a folder that holds Parquet, JSON beside it describes the data (a manifest, a ledger) and is
    left out.

    Raises:
        SourceError: nothing is there, or it cannot be listed.
    """
    if not path:
        raise SourceError("the path of the rows is empty, such as a variable that is not set")
    with storage.reading(path):
        urls = expand(path, tuple(FORMATS))
        tables = [url for url in urls if url.endswith(".parquet")]
        return tables if tables and storage.is_folder(path) else urls
