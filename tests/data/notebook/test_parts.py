"""The Parquet files of a prepared folder: in order, whole, and nothing of an earlier write."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.common import storage
from miles.data.notebook import parts
from miles.data.notebook.parts import PartFiles
from miles.data.rows.message_parts import LIMITS, PartMaker
from miles.data.step_schemas import MESSAGES
from miles.errors import WriteError


def part(num_rows: int) -> bytes:
    maker = PartMaker(LIMITS)
    maker.add(pa.Table.from_pylist([{}] * num_rows, schema=MESSAGES))
    content = maker.finish()
    assert content is not None
    return content


def written(folder: Path) -> dict[str, int]:
    files = sorted(folder.glob("*.parquet*"))
    return {file.name: pq.read_metadata(file).num_rows for file in files}


def test_files_are_numbered_in_their_order(tmp_path: Path) -> None:
    numbers = range(1, 9)  # more than are written at a time
    with PartFiles(str(tmp_path / "new/folder")) as files:
        for num_rows in numbers:
            files.add(part(num_rows))
    assert list(written(tmp_path / "new/folder").values()) == [*numbers]
    assert {file.name for file in tmp_path.rglob("*0.parquet")} == {"part-00000.parquet"}


def test_an_earlier_write_is_removed(tmp_path: Path) -> None:
    (tmp_path / "part-00007.parquet").write_text("of an earlier write")
    (tmp_path / f".part-00008.parquet.{'0a' * 16}.tmp").write_text("of one that was killed")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("of the user")
    with PartFiles(str(tmp_path)) as files:
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
        files.add(part(2))
    assert written(tmp_path) == {"part-00000.parquet": 2}
    assert (tmp_path / "notes.txt").exists()


def test_no_rows_are_no_file(tmp_path: Path) -> None:
    with PartFiles(str(tmp_path)):
        pass
    assert written(tmp_path) == {}


def test_a_file_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, content: bytes) -> None:
        raise WriteError(f"{url}: no")

    def write(num_files: int) -> None:
        with PartFiles(str(tmp_path)) as files:
            for number in range(num_files):
                added.append(number)
                files.add(part(1))

    monkeypatch.setattr(storage, "write_bytes", refuse)
    monkeypatch.setattr(parts, "_THREADS", 1)
    added: list[int] = []
    for num_files in (1, 9):
        with pytest.raises(WriteError, match=r"part-00000\.parquet: no"):
            write(num_files)
    assert added == [0, 0, 1], "it is raised while others are added, not only in the end"
