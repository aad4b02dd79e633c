"""Which checkpoints of a folder stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.common import storage
from miles.common.checkpoint_folder import (
    EXTRA,
    SAVING,
    find,
    remove_old,
    remove_unfinished,
)
from miles.common.checkpoint_tracker import TRACKER, write_tracker
from miles.errors import CheckpointError

LOSSES = {100: 3.0, 200: 1.0, 300: None, 400: 1.5, 500: 2.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for iteration, loss in LOSSES.items():
        place = tmp_path / f"iter_{iteration:07d}"
        place.mkdir()
        (place / EXTRA).write_text(json.dumps({"eval_loss": loss}))
    (tmp_path / TRACKER).write_text("500")
    (tmp_path / "release").mkdir()
    (tmp_path / "iter_notes").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (None, None, [100, 200, 300, 400, 500]),
        (2, None, [400, 500]),
        (1, 1, [200, 500]),
        (None, 2, [200, 400, 500]),
        (3, 1, [200, 300, 400, 500]),
        (9, None, [100, 200, 300, 400, 500]),
        (1, 9, [100, 200, 400, 500]),
    ],
)
def test_the_newest_and_the_best_stay(
    folder: Path, keep_last: int | None, keep_best: int | None, kept: list[int]
) -> None:
    removed = remove_old(str(folder), keep_last, keep_best)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"iter_{number:07d}" for number in kept), TRACKER, "release", "iter_notes"]
    )
    assert len(removed) == len(LOSSES) - len(kept)


def test_on_object_storage_as_well(bucket: str) -> None:
    url = f"{bucket}/run"
    for iteration, loss in LOSSES.items():
        storage.write_text(f"{url}/iter_{iteration:07d}/{EXTRA}", json.dumps({"eval_loss": loss}))
    storage.write_text(f"{url}/{TRACKER}", "500")
    removed = remove_old(url, 1, 1)
    assert [path.rsplit("_", 1)[-1] for path in removed] == ["0000100", "0000300", "0000400"]
    left = [
        iteration for iteration in LOSSES if storage.exists(f"{url}/iter_{iteration:07d}/{EXTRA}")
    ]
    assert left == [200, 500]


def test_later_checkpoints_stay_and_do_not_count(folder: Path) -> None:
    """Somebody went back from 500 to 200, and the run has saved 300 again."""
    (folder / TRACKER).write_text("300")
    assert [Path(path).name for path in remove_old(str(folder), 1, None)] == [
        "iter_0000100",
        "iter_0000200",
    ]
    assert {path.name for path in folder.glob("iter_0*")} == {
        "iter_0000300",
        "iter_0000400",
        "iter_0000500",
    }


def test_only_a_tracked_checkpoint_is_found(tmp_path: Path) -> None:
    """Whole or half, under its name or before it has one."""
    assert find(str(tmp_path)) is None
    for name in (f"{SAVING}iter_0000002-1f3c", "iter_0000002", "iter_0000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").write_text("{}")
    assert find(str(tmp_path)) is None
    write_tracker(str(tmp_path), 1)
    found = find(str(tmp_path))
    assert found is not None
    assert (found.url, found.iteration) == (str(tmp_path / "iter_0000001"), 1)
    assert remove_unfinished(str(tmp_path)) == [f"{SAVING}iter_0000002-1f3c"]
    assert sorted(path.name for path in tmp_path.glob("*iter_0*")) == [
        "iter_0000001",
        "iter_0000002",
    ]
    write_tracker(str(tmp_path), 3)
    with pytest.raises(CheckpointError, match=r"names \S+/iter_0000003, which is not there"):
        find(str(tmp_path))
