"""The index of a JSON file: kept between runs, believed only while the file is the same, and never
worth an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from miles.common import cache_files
from miles.data.config import RowFormat, SourceConfig
from miles.data.files import json_scan
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from tests.support.filesystems import Counting, memory

__all__ = ["memory"]

NUM_ROWS = 400
NAMES = ("rows.jsonl", "rows.json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and groups and buffers so small that a file has many."""
    monkeypatch.setenv(cache_files.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(json_scan, "GROUP_ROWS", 10)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 501)
    return tmp_path / "cache"


def made_rows() -> list[dict[str, Any]]:
    """Rows of one- to four-byte characters, of different lengths."""
    return [{"text": f"{number:05d} " + "é中😀" * (number % 7)} for number in range(NUM_ROWS)]


def content_of(name: str, rows: list[dict[str, Any]]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return ("\n".join(lines) if name.endswith("l") else "[" + ",\n ".join(lines) + "]").encode()


def counted(url: str) -> tuple[Manifest, int]:
    """The manifest of a file, and how many bytes of it were read."""
    Counting.ranges.clear()
    return build_manifest([SourceConfig("s", (url,), RowFormat("text"))]), Counting.num_bytes()


def read(manifest: Manifest, row_ids: Any) -> list[dict[str, Any]]:
    return [json.loads(row) for row in read_rows(manifest, np.asarray(row_ids))]


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_file_is_scanned_once(memory: MemoryFileSystem, name: str) -> None:
    rows = made_rows()
    content = content_of(name, rows)
    memory.pipe_file(f"/i/{name}", content)
    first, scanned = counted(f"counting:///i/{name}")
    again, looked_at = counted(f"counting:///i/{name}")
    assert scanned >= len(content)
    assert looked_at < len(content) / 10, "only the first rows, which tell their shape"
    assert again == first
    assert read(again, range(NUM_ROWS)) == rows


@pytest.mark.parametrize("name", NAMES)
def test_a_rewritten_file_is_scanned_anew(memory: MemoryFileSystem, name: str) -> None:
    memory.pipe_file(f"/i/{name}", content_of(name, made_rows()))
    old, _ = counted(f"counting:///i/{name}")
    # As many bytes, other places of the rows: the first row takes what the last one had.
    rows = made_rows()
    rows[0], rows[-1] = rows[-1], rows[0]
    content = content_of(name, rows)
    memory.pipe_file(f"/i/{name}", content)
    new, scanned = counted(f"counting:///i/{name}")
    assert new.sources[0].files[0].size_bytes == old.sources[0].files[0].size_bytes
    assert scanned >= len(content)
    assert new.fingerprint != old.fingerprint
    assert read(new, range(NUM_ROWS)) == rows


def test_local_stamps_are_size_and_mtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content_of(path.name, made_rows()))
    scans: list[str] = []
    whole = json_scan.scan
    monkeypatch.setattr(
        json_scan, "scan", lambda url, compression: scans.append(url) or whole(url, compression)
    )

    def describe() -> None:
        build_manifest([SourceConfig("s", (str(path),), RowFormat("text"))])

    describe()
    describe()
    assert len(scans) == 1
    os.utime(path, (1, 1))
    describe()
    assert len(scans) == 2
    path.write_bytes(path.read_bytes() + b'\n{"text": "more"}')
    os.utime(path, (1, 1))
    describe()
    assert len(scans) == 3


@pytest.mark.parametrize("name", NAMES)
def test_only_the_needed_ranges_are_read(memory: MemoryFileSystem, name: str) -> None:
    rows = made_rows()
    memory.pipe_file(f"/i/{name}", content_of(name, rows))
    manifest, _ = counted(f"counting:///i/{name}")
    groups = manifest.sources[0].files[0].row_groups
    assert len(groups) == NUM_ROWS // 10
    wanted = [395, 17, 12, 203]
    Counting.ranges.clear()
    assert read(manifest, wanted) == [rows[row] for row in wanted]
    needed = {(groups[row // 10].offset_bytes, groups[row // 10].length_bytes) for row in wanted}
    assert sorted((begin, end - begin) for _, begin, end in Counting.ranges) == sorted(needed)


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[]",
    "another version": lambda text: text.replace('"version": 2', '"version": 1'),
    "another cut": lambda text: text.replace('"cut": [10,', '"cut": [11,'),
    "another file's": lambda text: text.replace("counting://", "elsewhere://"),
    "ranges that overlap": lambda text: json.dumps(
        {**json.loads(text), "extents": [[10, 0, 99], [390, 50, 99]]}
    ),
    "ranges of nothing": lambda text: json.dumps({**json.loads(text), "extents": [[0, 0, 0]]}),
    "no numbers": lambda text: json.dumps({**json.loads(text), "extents": [["a", "b", "c"]]}),
    "a format of its own": lambda text: json.dumps({**json.loads(text), "format": "pickle"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(memory: MemoryFileSystem, cache: Path, damage: str) -> None:
    content = content_of("rows.jsonl", made_rows())
    memory.pipe_file("/i/rows.jsonl", content)
    first, _ = counted("counting:///i/rows.jsonl")
    (entry,) = (cache / "index").iterdir()
    whole = entry.read_text()
    damaged = DAMAGES[damage](whole)
    assert damaged != whole
    entry.write_text(damaged)
    again, scanned = counted("counting:///i/rows.jsonl")
    assert again == first
    assert scanned >= len(content)
    assert json.loads(entry.read_text()) == json.loads(whole), "and kept again"


def test_an_unusable_cache_is_ignored(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = made_rows()
    memory.pipe_file("/i/rows.jsonl", content_of("rows.jsonl", rows))
    (tmp_path / "a file").write_text("")
    for place in (f"{tmp_path}/a file/below", "nonsense://cache", "faulty:///cache"):
        monkeypatch.setenv(cache_files.VARIABLE, place)
        manifest, _ = counted("counting:///i/rows.jsonl")
        assert read(manifest, [3, 399]) == [rows[3], rows[399]]


def test_an_empty_variable_keeps_nothing(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of("rows.jsonl", made_rows())
    memory.pipe_file("/i/rows.jsonl", content)
    monkeypatch.setenv(cache_files.VARIABLE, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for _ in range(2):
        _, scanned = counted("counting:///i/rows.jsonl")
        assert scanned >= len(content)
    assert not list(tmp_path.iterdir())


def test_files_without_stamps_are_always_scanned(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of("rows.jsonl", made_rows())
    memory.pipe_file("/i/rows.jsonl", content)

    def info(self: Any, path: str, **kwargs: Any) -> dict[str, Any]:
        found = MemoryFileSystem.info(self, path, **kwargs)
        return {key: value for key, value in found.items() if key != "created"}

    monkeypatch.setattr(Counting, "info", info)
    for _ in range(2):
        _, scanned = counted("counting:///i/rows.jsonl")
        assert scanned >= len(content)
