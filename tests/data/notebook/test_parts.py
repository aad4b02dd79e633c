"""The Parquet files of a prepared folder: in order, of limited size, and nothing of an earlier write."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data.notebook import parts
from miles.data.notebook.parts import PartFiles
from miles.data.rows.messages_parquet import WRITTEN


def table(num_rows: int) -> pa.Table:
    return pa.Table.from_pylist([{}] * num_rows, schema=WRITTEN)


def written(folder: Path) -> dict[str, int]:
    files = sorted(folder.glob("part-*.parquet"))
    return {file.name: pq.read_metadata(file).num_rows for file in files}


def test_a_full_file_begins_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FILE_ROWS", 5)
    with PartFiles(str(tmp_path / "new/folder")) as files:
        for num_rows in (3, 3, 4):
            files.add(table(num_rows))
    assert written(tmp_path / "new/folder") == {"part-00000.parquet": 6, "part-00001.parquet": 4}


def test_an_earlier_write_is_removed(tmp_path: Path) -> None:
    (tmp_path / "part-00007.parquet").write_text("of an earlier write")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("of the user")
    with PartFiles(str(tmp_path)) as files:
        assert not (tmp_path / "manifest.json").exists()
        files.add(table(2))
    assert written(tmp_path) == {"part-00000.parquet": 2}
    assert (tmp_path / "notes.txt").exists()


def test_no_rows_are_no_file(tmp_path: Path) -> None:
    with PartFiles(str(tmp_path)):
        pass
    assert written(tmp_path) == {}
