"""Arrow IPC files and streams, and folders of `datasets.save_to_disk`."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest

from miles.common import storage
from miles.data.config import RowFormat, SourceConfig
from miles.data.files import arrow_ipc
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.data.types import UNREADABLE_ROW
from miles.errors import SourceError
from tests.support.row_cases import take

NUM_ROWS = 25
ROWS = [{"i": i, "text": "é中😀" * (i % 5), "tag": f"t{i % 3}"} for i in range(NUM_ROWS)]
TAGS = pa.dictionary(pa.int8(), pa.string())


def manifest_of(path: Path | str) -> Manifest:
    return build_manifest([SourceConfig("s", (str(path),), RowFormat("text"))])


def write(
    path: Path, table: pa.Table, kind: str = "stream", compression: str | None = None
) -> Path:
    """Write a table in batches of ten rows.

    Args:
        kind: "stream" or "file".
    """
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


def plain() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def with_dictionary() -> pa.Table:
    table = plain()
    return table.set_column(2, "tag", table.column("tag").cast(TAGS))


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("table", [plain, with_dictionary])
def test_any_rows_in_the_order_asked(
    tmp_path: Path, draw: Random, kind: str, compression: str | None, table: Any
) -> None:
    manifest = manifest_of(write(tmp_path / "x.arrow", table(), kind, compression))
    (file,) = manifest.sources[0].files
    assert [group.num_rows for group in file.row_groups] == [10, 10, 5]
    everything = list(range(NUM_ROWS))
    for wanted in (everything, draw.sample(everything, NUM_ROWS), [24, 3, 3], []):
        rows = [json.loads(row) for row in read_rows(manifest, np.array(wanted, int))]
        assert rows == [ROWS[number] for number in wanted]
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_dictionaries_that_grow_or_change(tmp_path: Path) -> None:
    """Each batch is read with the dictionaries that stand before it."""
    words = [["a", "b"], ["a", "b", "c"], ["z"]]
    batches = [
        pa.record_batch(
            {"text": pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), known)}
        )
        for known in words
    ]
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.ipc.new_stream(tmp_path / "x.arrow", batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    manifest = manifest_of(tmp_path / "x.arrow")
    rows = [json.loads(row)["text"] for row in read_rows(manifest, np.array([5, 0, 2, 4]))]
    assert rows == ["z", "a", "a", "z"]


@pytest.mark.parametrize("name", ["x.feather", "x.ipc"])
def test_feather_is_read(tmp_path: Path, name: str) -> None:
    pyarrow.feather.write_feather(plain(), tmp_path / name, chunksize=10)
    rows = read_rows(manifest_of(tmp_path / name), np.arange(NUM_ROWS))
    assert [json.loads(row) for row in rows] == ROWS


def test_views_and_nested_dictionaries_are_read(tmp_path: Path) -> None:
    """Parquet cannot hold some of them."""
    lists = pa.DictionaryArray.from_arrays(pa.array([1, None], pa.int8()), pa.array([["a"], ["b"]]))
    views = pa.array([["v" * 20, None], None], pa.list_view(pa.string_view()))
    table = pa.table({"lists": lists, "views": views, "binary": [b"\xff", None]})
    manifest = manifest_of(write(tmp_path / "x.arrow", table))
    assert manifest.sources[0].files[0].unread_columns == ("binary",)
    assert [json.loads(row) for row in read_rows(manifest, np.array([1, 0]))] == [
        {"lists": None, "views": None},
        {"lists": ["b"], "views": ["v" * 20, None]},
    ]


@pytest.mark.parametrize("folder", ["saved", "dict"])
def test_saved_datasets_are_read(folder: str) -> None:
    taken = take(f"save-to-disk/{folder}")
    assert len(taken.conversations) == 5
    assert taken.turns() == [("user", "Name a tree."), ("assistant", "A larch.")]


def test_only_wanted_batches_are_fetched(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a store, by ranges: heads to find the batches, then a batch at a time."""
    texts = [f"{number:07d}" * 20_000 for number in range(40)]
    path = write(tmp_path / "x.arrow", pa.table({"text": texts}))
    (tmp_path / "up").mkdir()
    path.rename(tmp_path / "up/x.arrow")
    storage.upload_folder(tmp_path / "up", f"{bucket}/ipc")

    fetched: Counter[str] = Counter()
    original = storage.RangeFile.read_range

    def counting(self: storage.RangeFile, begin: int, end: int) -> bytes:
        fetched["bytes"] += end - begin
        return original(self, begin, end)

    monkeypatch.setattr(storage.RangeFile, "read_range", counting)
    manifest = manifest_of(f"{bucket}/ipc/x.arrow")
    size_bytes = manifest.sources[0].files[0].size_bytes
    assert fetched["bytes"] < size_bytes / 2
    fetched.clear()
    (row,) = read_rows(manifest, np.array([13]))
    assert json.loads(row) == {"text": texts[13]}
    assert size_bytes / 5 < fetched["bytes"] < size_bytes / 2


# --- what cannot be read --------------------------------------------------------------------------


def test_a_row_that_is_no_text_is_rejected_alone(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    rows = read_rows(manifest_of(write(tmp_path / "x.arrow", pa.table({"t": texts}))), np.arange(3))
    assert rows == [b'{"t":"a"}', UNREADABLE_ROW, b'{"t":"c"}']
    texts = pa.array([b"\xff", b"a", b"b"]).view(pa.string())
    taken = take(write(tmp_path / "y.arrow", pa.table({"text": texts})))
    assert taken.reasons == ["malformed_json", None, None]


def test_offsets_that_lead_outside_end_no_process(tmp_path: Path) -> None:
    """pyarrow does not look at them when it reads, and would read memory that is not the file's."""
    path = write(tmp_path / "x.arrow", pa.table({"t": ["aaaa", "bbbb", "cccc"]}))
    offsets = np.array([0, 4, 8, 12], np.int32).tobytes()
    hostile = np.array([0, 4, 1 << 30, 12], np.int32).tobytes()
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, hostile))
    rows = read_rows(manifest_of(path), np.arange(3))
    assert rows == [b'{"t":"aaaa"}', UNREADABLE_ROW, UNREADABLE_ROW]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_cut_is_named_wherever_it_is(tmp_path: Path, kind: str) -> None:
    content = write(tmp_path / "whole.arrow", plain(), kind).read_bytes()
    (group, *_) = arrow_ipc.scan(str(tmp_path / "whole.arrow"), len(content))
    path = tmp_path / "x.arrow"
    for length in (3, 7, 40, group[1] - 4, group[1] + 4, group[1] + group[2] - 1, len(content) - 9):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError, match=r"x\.arrow: .*cut off .* Copy or write it again"):
            manifest_of(path)


def test_junk_is_an_error_of_the_file(tmp_path: Path, draw: Random) -> None:
    content = write(tmp_path / "whole.arrow", plain()).read_bytes()
    path = tmp_path / "x.arrow"
    for junk, what in (
        (b"version https://git-lfs.github.com/spec/v1\n", "Arrow data, .* but a Git LFS pointer"),
        (b"PAR1" + bytes(50), r"but a Parquet file. Name it x\.parquet"),
        (b"\x01" + draw.randbytes(500), "cannot be read: not an Arrow IPC file"),
    ):
        path.write_bytes(junk)
        with pytest.raises(SourceError, match=rf"x\.arrow: .*{what}"):
            manifest_of(path)
    for _ in range(60):
        broken = bytearray(content)
        for _ in range(3):
            broken[draw.randrange(1_000)] = draw.randrange(256)
        path.write_bytes(broken)
        with contextlib.suppress(SourceError):
            manifest = manifest_of(path)
            read_rows(manifest, np.arange(min(manifest.num_rows, NUM_ROWS)))


def test_old_feather_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.feather").write_bytes(b"FEA1" + bytes(100) + b"FEA1")
    with pytest.raises(SourceError, match="Feather of version 1, which is not read"):
        manifest_of(tmp_path / "x.feather")


def test_a_batch_too_large_to_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow_ipc, "MAX_BATCH_BYTES", 500)
    with pytest.raises(SourceError, match=r"batch at byte .* in smaller batches"):
        manifest_of(write(tmp_path / "x.arrow", plain()))


def test_an_empty_stream_has_no_row(tmp_path: Path) -> None:
    for table in (plain().slice(0, 0), pa.table({})):
        with pytest.raises(SourceError, match="has no row"):
            manifest_of(write(tmp_path / "x.arrow", table))
