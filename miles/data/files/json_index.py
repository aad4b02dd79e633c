"""The row groups of scanned JSON files, kept between runs: only a new or changed file is scanned.

    $MILES_CACHE/index/<hash of the URL>.json

    {"version": 2, "url": …, "size_bytes": …, "stamp": …, "cut": …, "format": "jsonl",
     "extents": [[1000, 0, 81920], …]}

`MILES_CACHE` is a folder (an fsspec URL); without it, the user's own (`common/cache_files.py`). An
entry holds while the file's size and stamp are the same. A file without a stamp is scanned each
time, and every file where nothing is to be kept.

The cache saves time and changes nothing else. An entry that is damaged, of another version or not
readable is replaced by a new scan, and a folder that cannot be written is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

from miles.common import cache_files, storage
from miles.data.files import arrow_ipc, csv_scan, json_scan
from miles.data.files.json_scan import Extent

INDEX_VERSION = 2
"""Raised whenever a scan finds other rows in some file than before."""
_FORMATS = ("json", "jsonl", "arrow", "csv", "tsv")


def extents(
    url: str, kind: str, compression: str | None, size_bytes: int, stamp: str
) -> tuple[str, list[Extent]]:
    """Return what a scan finds in a file, from the cache where the file is unchanged.

    Args:
        kind: the format that its name says.
        compression: as for `json_scan.scan`.
        size_bytes, stamp: the file's, as they are now.

    Raises:
        SourceError: as `json_scan.scan`.
    """
    root = cache_files.root()
    if not stamp or root is None:
        return _scan(url, kind, compression, size_bytes)

    entry_url = storage.join(root, "index", f"{_hash_of(url)}.json")
    identity = {
        "version": INDEX_VERSION,
        "url": url,
        "size_bytes": size_bytes,
        "stamp": stamp,
        "cut": [json_scan.GROUP_ROWS, json_scan.GROUP_BYTES],
    }
    kept = _load(entry_url, identity)
    if kept is not None:
        return kept

    kind, scanned = _scan(url, kind, compression, size_bytes)
    _save(entry_url, identity | {"format": kind, "extents": scanned})
    return kind, scanned


def _scan(
    url: str, kind: str, compression: str | None, size_bytes: int
) -> tuple[str, list[Extent]]:
    """Return the format of a file, and the extents of its row groups."""
    if kind == "arrow":
        return kind, arrow_ipc.scan(url, size_bytes)
    if kind in ("csv", "tsv"):
        return kind, csv_scan.scan(url, kind, compression)
    return json_scan.scan(url, compression)


def _hash_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _load(entry_url: str, identity: dict[str, Any]) -> tuple[str, list[Extent]] | None:
    """Return the entry of a file; None if there is none, or it is stale or damaged in any way."""
    # A cache is worth no error, whatever is wrong with it, and no wait for a second try.
    try:
        entry = json.loads(storage.read_text(entry_url, max_tries=1))
        is_current = all(entry[key] == value for key, value in identity.items())
        if not is_current or entry["format"] not in _FORMATS:
            return None
        kept = [(int(rows), int(offset), int(length)) for rows, offset, length in entry["extents"]]
    except Exception:
        return None

    return (entry["format"], kept) if _is_in_order(kept) else None


def _is_in_order(extents: list[Extent]) -> bool:
    """Return whether extents hold rows, in file order and without overlap."""
    end = 0
    for rows, offset, length in extents:
        if rows < 1 or length < 1 or offset < end:
            return False
        end = offset + length
    return True


def _save(entry_url: str, entry: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        storage.write_text(entry_url, json.dumps(entry), max_tries=1)
