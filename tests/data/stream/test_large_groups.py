"""Row groups larger than windows: refused where rows are shuffled, streamed once in file order."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, RowFormat, SourceConfig
from miles.data.files import json_scan, parquet, read
from miles.data.files.group_sizes import largest_read_rows, require_small_groups
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows, stream_rows
from miles.data.stream import stages
from miles.errors import SourceError
from tests.support.filesystems import Counting, memory

__all__ = ["memory"]

KINDS = ["x.parquet", "x.jsonl.gz", "x.jsonl.zst", "x.json", "x.jsonl"]


def content_of(name: str, num_rows: int, group_rows: int, text_bytes: int = 40) -> bytes:
    texts = [os.urandom(text_bytes // 2).hex() for _ in range(num_rows)]
    lines = b"".join(
        b'{"i": %d, "text": "%s"}\n' % (i, text.encode()) for i, text in enumerate(texts)
    )
    if name.endswith(".parquet"):
        sink = io.BytesIO()
        table = pa.table({"i": range(num_rows), "text": texts})
        pq.write_table(table, sink, row_group_size=group_rows, use_dictionary=False)
        return sink.getvalue()
    array = b"[" + lines.rstrip().replace(b"\n", b",\n") + b"]"
    return {
        "x.jsonl.gz": lambda: gzip.compress(lines, 1),
        "x.jsonl.zst": lambda: zstandard.compress(lines),
        "x.json": lambda: array,
        "x.jsonl": lambda: lines,
    }[name]()


def manifest_of(*urls: str | Path) -> Manifest:
    return build_manifest(
        [SourceConfig(f"s{i}", (str(url),), RowFormat("text")) for i, url in enumerate(urls)]
    )


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz", "x.jsonl.zst"])
def test_groups_larger_than_windows_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content_of(name, 5_000, 5_000))
    manifest = manifest_of(path)
    assert largest_read_rows(manifest) == 5_000
    require_small_groups(manifest, 1_250)
    with pytest.raises(SourceError) as caught:
        require_small_groups(manifest, 1_249)
    for part in (
        f"{path}: ",
        "row group 0" if name == "x.parquet" else "file",
        "has 5,000 rows",
        "about 5 times an epoch",
        f"miles prepare s0 --source {path} --tokenizer DIR --output FOLDER",
        "--shuffle-window of 1,250 rows",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_plain_json_has_small_groups(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(content_of(name, 5_000, 0))
    manifest = manifest_of(tmp_path / name)
    assert largest_read_rows(manifest) == json_scan.GROUP_ROWS
    require_small_groups(manifest, 1)


def test_the_largest_group_of_all_files_counts(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(content_of("x.parquet", 3_000, 1_000))
    (tmp_path / "b.parquet").write_bytes(content_of("x.parquet", 3_000, 2_000))
    manifest = manifest_of(tmp_path)
    assert largest_read_rows(manifest) == 2_000
    require_small_groups(manifest, 500)
    with pytest.raises(SourceError, match=r"b\.parquet: row group 0 has 2,000 rows"):
        require_small_groups(manifest, 499)


def test_weighted_sources_count_by_their_share(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(content_of("x.parquet", 3_000, 3_000))
    (tmp_path / "b.parquet").write_bytes(content_of("x.parquet", 3_000, 1_000))
    manifest = manifest_of(tmp_path / "a.parquet", tmp_path / "b.parquet")
    require_small_groups(manifest, 1_000)
    require_small_groups(manifest, 1_000, [750, 250])
    with pytest.raises(
        SourceError,
        match=r"a\.parquet: .* a window has 250 of this source .* of 3,000 rows or more",
    ):
        require_small_groups(manifest, 1_000, [250, 750])
    require_small_groups(manifest, 3_000, [750, 2_250])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("begin", [0, 1, 999, 1_000, 4_321])
def test_stream_rows_keeps_the_order(tmp_path: Path, name: str, begin: int) -> None:
    paths = [tmp_path / part / name for part in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(content_of(name, 5_000, 5_000))
    manifest = manifest_of(*paths)
    wanted = np.arange(begin, 7_777)
    for row_ids in (wanted, wanted[wanted % 3 > 0]):
        batches = list(stream_rows(manifest, row_ids))
        assert sum(batches, []) == read_rows(manifest, row_ids)  # noqa: RUF017
        assert max(len(batch) for batch in batches) <= 1_000


def reads_of(manifest: Manifest, order: OrderConfig) -> list[pa.Table]:
    plan = stages.make_plan(
        manifest, DataConfig((SourceConfig("s", ("x",)),), order, EncodeConfig("t"))
    )
    return [
        table for ref in plan.windows(0) for table in stages.read_window(manifest, plan, ref, 0)
    ]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("large_bytes", [1, 32 << 20])
def test_file_order_reads_once(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, name: str, large_bytes: int
) -> None:
    """Also where windows cut the groups. Windows smaller than the groups read it many times."""
    monkeypatch.setattr(parquet, "WHOLE_GROUP_BYTES", large_bytes)
    monkeypatch.setattr(parquet, "STREAM_BUFFER_BYTES", 16 << 10)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 32 << 10)
    content = content_of(name, 20_000, 5_000)
    memory.pipe_file(f"/large/{name}", content)
    manifest = manifest_of(f"counting:///large/{name}")

    for window_rows, most in (
        (largest_read_rows(manifest), 1.2),
        (largest_read_rows(manifest) * 3 // 2, 2.2),
    ):
        Counting.ranges.clear()
        order = OrderConfig(batch_size=100, window_rows=window_rows)
        tables = reads_of(manifest, order)
        assert sum(sum(table["num_rows"].to_pylist()) for table in tables) == 20_000
        assert Counting.num_bytes() <= most * len(content)

    if name == "x.parquet":
        Counting.ranges.clear()
        reads_of(manifest, OrderConfig(batch_size=100, window_rows=500))
        assert Counting.num_bytes() > 4 * len(content)


def test_first_step_comes_before_the_group_ends(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "WHOLE_GROUP_BYTES", 1)
    monkeypatch.setattr(parquet, "STREAM_BUFFER_BYTES", 16 << 10)
    content = content_of("x.parquet", 200_000, 200_000)  # many pages, of which one a column is read
    memory.pipe_file("/large/x.parquet", content)
    manifest = manifest_of("counting:///large/x.parquet")
    Counting.ranges.clear()
    config = DataConfig(
        (SourceConfig("s", ("x",)),), OrderConfig(100, window_rows=200_000), EncodeConfig("t")
    )
    plan = stages.make_plan(manifest, config)
    (ref,) = plan.windows(0)
    first = next(stages.read_window(manifest, plan, ref, 0))
    assert first["step"][0].as_py() == 0
    assert Counting.num_bytes() < len(content) / 4


PEAK_BYTES = """
import sys
import numpy as np
import pyarrow as pa
from miles.data.config import RowFormat, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows, stream_rows
manifest = build_manifest([SourceConfig("s", (sys.argv[1],), RowFormat("text"))])
ids = np.arange(manifest.num_rows)
if sys.argv[2] == "stream":
    assert sum(len(rows) for rows in stream_rows(manifest, ids)) == len(ids)
else:
    assert len(read_rows(manifest, ids[:: len(ids) // 1_000])) >= 1_000
# ru_maxrss would begin at the parent process's.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024, pa.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz"])
@pytest.mark.parametrize("how", ["stream", "sample"])
def test_memory_does_not_grow_with_the_group(tmp_path: Path, name: str, how: str) -> None:
    peaks = []
    for num_rows in (30_000, 300_000):
        path = tmp_path / str(num_rows) / name
        path.parent.mkdir()
        path.write_bytes(content_of(name, num_rows, num_rows, text_bytes=200))
        run = subprocess.run(
            [sys.executable, "-c", PEAK_BYTES, str(path), how],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append([int(word) for word in run.stdout.split()])
    (small, _), (large, large_arrow) = peaks
    assert large < small + (24 << 20), "60 MB of text"
    assert large_arrow < 32 << 20


def test_pieces_are_not_fetched_ahead_of_large_ones() -> None:
    assert read.AHEAD_ROWS >= parquet.BATCH_ROWS == json_scan.GROUP_ROWS, (
        "ordinary groups are fetched ahead"
    )
