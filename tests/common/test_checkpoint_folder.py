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
    find_start,
    remove_old,
    remove_unfinished,
)
from miles.common.checkpoint_tracker import TRACKER, write_tracker
from miles.errors import CheckpointError
from tests.support.checkpoints import write_checkpoint
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, observed

LOSSES = {100: 3.0, 200: 1.0, 300: None, 400: 1.5, 500: 2.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for iteration, loss in LOSSES.items():
        write_checkpoint(tmp_path, iteration, json.dumps({"eval_loss": loss}))
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
    removed = remove_old(str(folder), keep_last, keep_best).removed
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"iter_{number:07d}" for number in kept), TRACKER, "release", "iter_notes"]
    )
    assert len(removed) == len(LOSSES) - len(kept)


def test_on_object_storage_as_well(bucket: str) -> None:
    url = f"{bucket}/run"
    for iteration, loss in LOSSES.items():
        write_checkpoint(url, iteration, json.dumps({"eval_loss": loss}))
    storage.write_text(f"{url}/{TRACKER}", "500")
    removed = remove_old(url, 1, 1).removed
    assert [path.rsplit("_", 1)[-1] for path in removed] == ["0000100", "0000300", "0000400"]
    left = [
        iteration for iteration in LOSSES if storage.exists(f"{url}/iter_{iteration:07d}/{EXTRA}")
    ]
    assert left == [200, 500]


def test_later_checkpoints_stay_and_do_not_count(folder: Path) -> None:
    """Somebody went back from 500 to 200, and the run has saved 300 again."""
    (folder / TRACKER).write_text("300")
    assert [Path(path).name for path in remove_old(str(folder), 1, None).removed] == [
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
        write_checkpoint(tmp_path, name)
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


def test_a_leaving_that_stays_is_not_called_removed(tmp_path: Path) -> None:
    for name in ("iter_0000001", "iter_0000002"):
        write_checkpoint(tmp_path, f"{SAVING}{name}")
    with small_disk(tmp_path / f"{SAVING}iter_0000001/disk", "size=64k"):
        assert remove_unfinished(str(tmp_path)) == [f"{SAVING}iter_0000002"]
    assert remove_unfinished(str(tmp_path)) == [f"{SAVING}iter_0000001"]


def torch_dist(folder: Path, name: str, extra: str = "") -> str:
    """Make a folder with a tracker and what is looked for in the checkpoint that it names."""
    write_checkpoint(folder, name, extra)
    (folder / TRACKER).write_text(name.removeprefix("iter_"))
    return str(folder)


def hugging_face(folder: Path) -> str:
    folder.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (folder / name).touch()
    return str(folder)


def test_weights_to_begin_with_have_an_order(tmp_path: Path) -> None:
    hf = hugging_face(tmp_path / "hf")
    other = hugging_face(tmp_path / "other")
    converted = torch_dist(tmp_path / "megatron", "release")
    save = str(tmp_path / "run")

    def start(save: str, load: str | None = None, ref_load: str | None = None) -> tuple[str, bool]:
        checkpoint, is_resume = find_start(save, load, ref_load, hf)
        assert checkpoint.is_hugging_face == (checkpoint.url in (hf, other))
        assert checkpoint.iteration == (7 if is_resume else 0)
        return checkpoint.url, is_resume

    assert start(save) == (hf, False)
    assert start(save, load=f"{save}/") == (hf, False), "as in Miles's own lines"
    assert start(save, ref_load=other) == (other, False)
    assert start(save, ref_load=converted) == (f"{converted}/release", False)
    assert start(converted) == (f"{converted}/release", False)
    assert start(save, load=converted) == (f"{converted}/release", False)

    run = torch_dist(tmp_path / "earlier", "iter_0000007", extra="{}")
    assert start(save, load=run, ref_load=other) == (f"{run}/iter_0000007", True)
    own = torch_dist(tmp_path / "own", "iter_0000007", extra="{}")
    assert start(own, load=run, ref_load=other) == (f"{own}/iter_0000007", True)


def test_no_weights_are_named_with_the_remedy(tmp_path: Path) -> None:
    hf = hugging_face(tmp_path / "hf")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").touch()
    save = str(tmp_path / "run")

    with pytest.raises(CheckpointError, match=rf"empty: no Megatron .*, nor .*out .* of {hf}, or"):
        find_start(save, None, str(empty), hf)
    missing = str(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"empty: no weights there either\. Put the weights"):
        find_start(save, None, missing, str(empty))
    with pytest.raises(CheckpointError, match=r"empty: that is --hf-checkpoint itself\. Put the"):
        find_start(save, None, f"{empty}/", str(empty))
    with pytest.raises(CheckpointError, match=r"mistyped: no Megatron .* leave --load out"):
        find_start(save, str(tmp_path / "mistyped"), None, hf)
    with pytest.raises(
        CheckpointError, match=r"mistyped: no Megatron .* leave --load out .* of \S+/hf"
    ):
        find_start(save, str(tmp_path / "mistyped"), hf, hf)
    with pytest.raises(CheckpointError, match=r"empty: no weights there \(\*\.safetensors\), and"):
        find_start(save, None, None, str(empty))


def test_a_broken_miles_json_is_refused_with_what_else_is_possible(folder: Path) -> None:
    """It is what a run needs to go on; the weights are whole."""
    extra = folder / f"iter_0000500/{EXTRA}"
    extra.write_text('{"cursor": {"consumed_rows": 16')
    with pytest.raises(CheckpointError, match=r"No other checkpoint in .* can be gone on from"):
        find(str(folder))
    found = find(str(folder), weights_only=True)
    assert found is not None
    assert (found.iteration, found.extra) == (500, None)

    (folder / f"iter_0000200/{EXTRA}").write_text('{"cursor": {}}')
    (folder / f"iter_0000400/{EXTRA}").write_text("")
    with pytest.raises(CheckpointError) as refused:
        find_start(str(folder), None, None, "hf")
    tracker = folder / TRACKER
    assert f"step 200 is whole: put 200 into {tracker}, and the same command" in str(refused.value)
    observed("`miles.json` of the newest checkpoint cut off", str(refused.value), EXTRA, NOTHING)

    tracker.write_text("200")
    start, is_resume = find_start(str(folder), None, None, "hf")
    assert (start.iteration, is_resume) == (200, True)


def test_a_broken_checkpoint_may_be_the_best(folder: Path) -> None:
    (folder / f"iter_0000300/{EXTRA}").write_text('{"eval_loss": 0.')
    removed = remove_old(str(folder), keep_last=1, keep_best=1).removed
    assert [Path(path).name for path in removed] == ["iter_0000100", "iter_0000400"]
