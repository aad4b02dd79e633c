"""Rows come back in the order asked, as JSON, from every format; a changed file is refused."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miles.data import read, scan
from miles.data.config import SourceConfig
from miles.data.manifest import Manifest, build_manifest
from miles.data.read import read_rows
from miles.errors import SourceError

NUM_ROWS = 57


def content_of(kind: str, tmp_path: Path) -> tuple[str, bytes]:
    rows = [{"i": i, "text": "é中😀" * (i % 5)} for i in range(NUM_ROWS)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    array = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made", row_group_size=10)
        return "x.parquet", (tmp_path / "made").read_bytes()
    return {
        "lines": ("x.jsonl", lines),
        "array": ("x.json", array),
        "lines.gz": ("x.jsonl.gz", gzip.compress(lines)),
        "lines.zst": ("x.jsonl.zst", zstandard.compress(lines)),
        "array.zst": ("x.json.zst", zstandard.compress(array)),
    }[kind]


KINDS = ["parquet", "lines", "array", "lines.gz", "lines.zst", "array.zst"]


def manifest_of(*paths: Path | str) -> Manifest:
    return build_manifest([SourceConfig(f"s{i}", (str(path),)) for i, path in enumerate(paths)])


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "GROUP_ROWS", 10)
    monkeypatch.setattr(scan, "BUFFER_BYTES", 37)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remote", [False, True])
def test_any_rows_in_the_order_asked(tmp_path: Path, kind: str, remote: bool) -> None:
    name, content = content_of(kind, tmp_path)
    folder = "memory://reading" if remote else str(tmp_path / "data")
    fs, path = fsspec.core.url_to_fs(folder)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/{name}", content)
    try:
        manifest = manifest_of(f"{folder}/{name}")
        assert len(manifest.group_starts) == 7
        random = np.random.default_rng(0)
        for wanted in (np.arange(NUM_ROWS), random.permutation(NUM_ROWS), np.array([56, 12, 12, 3]), np.array([], int)):
            assert [json.loads(row)["i"] for row in read_rows(manifest, wanted)] == wanted.tolist()
    finally:
        fs.rm(path, recursive=True)


@pytest.mark.usefixtures("small_groups")
def test_rows_of_several_files(tmp_path: Path) -> None:
    paths = []
    for kind in KINDS:
        name, content = content_of(kind, tmp_path)
        paths.append(tmp_path / kind / name)
        paths[-1].parent.mkdir()
        paths[-1].write_bytes(content)
    manifest = manifest_of(*paths)
    wanted = np.random.default_rng(1).permutation(manifest.num_rows)[:100]
    rows = [json.loads(row) for row in read_rows(manifest, wanted)]
    assert [row["i"] for row in rows] == (wanted % NUM_ROWS).tolist()
    assert all(row["text"] == "é中😀" * (row["i"] % 5) for row in rows)


def test_only_the_groups_that_are_needed_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content = content_of("parquet", tmp_path)
    (tmp_path / name).write_bytes(content)
    manifest = manifest_of(tmp_path / name)
    groups: list[int] = []
    original = read._parquet_groups

    def watching(file, indices, wanted):  # type: ignore[no-untyped-def]
        groups.extend(indices)
        return original(file, indices, wanted)

    monkeypatch.setattr(read, "_parquet_groups", watching)
    read_rows(manifest, np.array([31, 2, 30, 5]))
    assert groups == [0, 3]


def test_a_compressed_file_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BUFFER_BYTES", 64 << 10)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": "%s"}\n' % (b"x" * 400) * 20_000, compresslevel=1))  # 8 MB of text
    manifest = manifest_of(path)
    tracemalloc.start()
    try:
        assert len(read_rows(manifest, np.array([19_999, 3]))) == 2
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_json_lines_are_handed_through(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [b'{"a":   1}', b"{broken", b"\xff\xfe", b'"text"', b'{"a": "\\ud800"}']
    path.write_bytes(b"\n".join(lines))
    assert read_rows(manifest_of(path), np.arange(5)) == lines


def test_what_json_cannot_say(tmp_path: Path) -> None:
    table = pa.table(
        {
            "nan": pa.array([float("nan"), 1.5]),
            "nested": pa.array([[{"x": float("inf")}], None], pa.list_(pa.struct([("x", pa.float64())]))),
            "when": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5), None]),
            "nanoseconds": pa.array([1, 2], pa.timestamp("ns")),
            "day": pa.array([datetime.date(2024, 1, 2), None]),
            "money": pa.array([decimal.Decimal("1.50"), None]),
            "raw": pa.array([b"ab\xff", b""]),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        }
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    first, second = (json.loads(row) for row in read_rows(manifest_of(path), np.arange(2)))
    assert first == {
        "nan": None,
        "nested": [{"x": None}],
        "when": "2024-01-02T03:04:05",
        "nanoseconds": "1970-01-01T00:00:00",
        "day": "2024-01-02",
        "money": "1.50",
        "raw": "ab\\xff",
        "map": [["k", 1]],
    }
    assert second["nan"] == 1.5
    assert second["nested"] is None


def test_one_row_that_is_no_text_spoils_no_other(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe", b"too"]).view(pa.string())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": broken}), path)
    assert read_rows(manifest_of(path), np.arange(3)) == [b'{"a": "good"}', read.UNREADABLE_ROW, b'{"a": "too"}']


@pytest.mark.parametrize("kind", ["parquet", "lines", "lines.gz"])
def test_a_changed_or_missing_file_is_refused(tmp_path: Path, kind: str) -> None:
    name, content = content_of(kind, tmp_path)
    path = tmp_path / name
    path.write_bytes(content)
    manifest = manifest_of(path)
    os.utime(path, (1_000, 1_000))
    with pytest.raises(SourceError, match=f"{name}: changed since"):
        read_rows(manifest, np.array([0]))
    path.unlink()
    with pytest.raises(SourceError, match=f"{name}: no such file"):
        read_rows(manifest, np.array([0]))


def test_the_real_sample(assets: Path) -> None:
    path = assets / "data/openhermes_sample.parquet"
    manifest = manifest_of(path)
    wanted = np.array([16_417, 0, 5_000])
    rows = [json.loads(row) for row in read_rows(manifest, wanted)]
    assert rows == [pq.read_table(path).slice(int(i), 1).to_pylist()[0] for i in wanted]
