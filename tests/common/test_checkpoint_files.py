"""A checkpoint that has lost a file is nowhere taken for a complete one."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.common import run_record, storage
from miles.common.checkpoint_choice import ways_on
from miles.common.checkpoint_files import (
    INDEX,
    MARK,
    complete_iterations,
    iterations,
    missing_files,
    named_missing,
)
from miles.common.checkpoint_folder import find, find_start
from miles.common.checkpoint_tracker import write_tracker
from miles.convert import torch_dist
from miles.errors import CheckpointError
from tests.support.checkpoints import SMALLEST, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with three checkpoints."""
    for iteration in (8, 16, 24):
        write_checkpoint(tmp_path, iteration, '{"cursor": {}}')
    write_tracker(str(tmp_path), 24)
    return tmp_path


def test_each_file_is_missed(tmp_path: Path) -> None:
    folder = Path(write_checkpoint(tmp_path, 8))
    assert missing_files(str(folder)) == []
    for name in SMALLEST:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert missing_files(str(folder)) == [name]
        (folder / name).write_bytes(content)
    assert missing_files(str(tmp_path / "none")) == [INDEX, MARK]

    (folder / INDEX).write_bytes(b"")
    assert missing_files(str(folder)) == []
    for path in folder.glob("*.distcp"):
        path.unlink()
    assert missing_files(str(folder)) == ["*.distcp"]
    assert named_missing(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more: no such file"


@pytest.mark.parametrize("lost", SMALLEST)
def test_it_is_neither_taken_nor_named_as_a_way_on(run: Path, lost: str) -> None:
    (run / "iter_0000016" / lost).unlink()
    assert (iterations(str(run)), complete_iterations(str(run))) == ([8, 16, 24], [8, 24])
    assert "checkpoints of steps 8, 24 in" in ways_on(str(run))
    assert "There is no complete checkpoint in" in ways_on(str(run / "iter_0000016"))

    (run / "iter_0000024" / lost).unlink()
    way = r"step 8: echo 8 > " if lost == MARK else r"The checkpoint of step 8 is whole: put 8 into"
    with pytest.raises(CheckpointError, match=rf"iter_0000024.*{way}"):
        find(str(run))
    for save, load, ref_load in (("new", run, None), ("new", None, run)):
        with pytest.raises(CheckpointError, match=r"iter_0000024.*step 8"):
            find_start(str(run / save), load and str(load), ref_load and str(ref_load), "hf")
    for iteration in (None, 16):
        with pytest.raises(CheckpointError, match=r"not there, or not complete .*: no such file"):
            torch_dist.newest(str(run), iteration)
    with pytest.raises(CheckpointError, match="no Megatron checkpoint there"):
        torch_dist.newest(str(run / "iter_0000016"))


def test_what_is_left_of_a_run_is_not_overwritten(tmp_path: Path) -> None:
    """Its checkpoints are no way on, but they are there."""
    folder = Path(write_checkpoint(tmp_path, 8))
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"overwrite those that are there\. There is no comp"):
        run_record.require_new(str(tmp_path), str(tmp_path))


def test_a_store_is_asked_few_times(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the checkpoint that the tracker names, however many there are."""
    url = f"{bucket}/run"
    for iteration in (8, 16, 24):
        write_checkpoint(url, iteration, '{"cursor": {}}')
    write_tracker(url, 24)

    asked: list[str] = []
    for name in ("names", "read_bytes"):
        before = getattr(storage, name)

        def noted(url: str, *more: int, call: object = before) -> object:
            asked.append(url.removeprefix(f"{bucket}/run/"))
            return call(url, *more)  # type: ignore[operator]

        monkeypatch.setattr(storage, name, noted)
    assert find(url) is not None
    folder = "iter_0000024"
    tracker = "latest_checkpointed_iteration.txt"
    assert asked == [tracker, folder, f"{folder}/.metadata", f"{folder}/miles.json"]
