"""Where the rows of a JSON file lie, kept between runs, so that only a new or changed file is scanned.

    $MILES_CACHE/index/<hash of the URL>.json     MILES_CACHE: a folder (fsspec URL), ~/.cache/miles without it
    {"version": 1, "url": …, "size_bytes": …, "stamp": …, "cut": …, "format": "jsonl", "extents": [[1000, 0, 81920], …]}

It holds while the file's size and stamp (entity tag, or time of the last change) are the same; a file that has no
stamp is scanned each time. What is kept changes nothing but the time that it takes: an entry that is damaged, of
another version or cannot be had is made anew, and a folder that cannot be written is done without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from miles.common import storage
from miles.data.files import json_scan
from miles.data.files.json_scan import Extent

INDEX_VERSION = 1
CACHE_VARIABLE = "MILES_CACHE"


def extents(
    url: str, compression: str | None, size_bytes: int, stamp: str
) -> tuple[str, list[Extent]]:
    """What `scan.scan` finds, of this file now or when it was scanned before.

    Args:
        compression: as for `scan.scan`.
        size_bytes, stamp: the file's, now.

    Raises:
        SourceError: as `scan.scan`.
    """
    if not stamp:
        return json_scan.scan(url, compression)
    of_file = {
        "version": INDEX_VERSION,
        "url": url,
        "size_bytes": size_bytes,
        "stamp": stamp,
        "cut": [json_scan.GROUP_ROWS, json_scan.GROUP_BYTES],
    }
    kept = _load(url, of_file)
    if kept is None:
        kept = json_scan.scan(url, compression)
        _save(url, of_file | {"format": kept[0], "extents": kept[1]})
    return kept


def _place(url: str) -> str:
    folder = os.environ.get(CACHE_VARIABLE) or str(Path.home() / ".cache" / "miles")
    return storage.join(folder, "index", f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.json")


def _load(url: str, of_file: dict[str, Any]) -> tuple[str, list[Extent]] | None:
    # A cache is not worth an error, whatever is wrong with it, nor a wait.
    try:
        entry = json.loads(storage.read_text(_place(url), max_tries=1))
        if any(entry[key] != value for key, value in of_file.items()) or entry["format"] not in (
            "json",
            "jsonl",
        ):
            return None
        found = [(int(rows), int(offset), int(length)) for rows, offset, length in entry["extents"]]
    except Exception:
        return None
    end = 0
    for rows, offset, length in found:
        if rows < 1 or length < 1 or offset < end:
            return None
        end = offset + length
    return (str(entry["format"]), found)


def _save(url: str, entry: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        storage.write_text(_place(url), json.dumps(entry), max_tries=1)
