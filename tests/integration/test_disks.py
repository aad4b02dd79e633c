"""Disks that are full, and checkpoints on object storage."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path

import pytest

from miles.common import storage
from tests.support.commands import Workspace
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, SINCE, observed
from tests.support.runs import NUM_STEPS, lines, require_same, tracked, weights

pytestmark = pytest.mark.slow


def fill(disk: Path, but_bytes: int) -> Path:
    """A file that leaves so much room."""
    ballast = disk / "ballast"
    num_bytes = shutil.disk_usage(disk).free
    with ballast.open("wb") as stream:
        stream.write(bytes(max(0, num_bytes - but_bytes)))
    return ballast


def test_full_disk_spares_complete_checkpoints(
    workspace: Workspace, unbroken: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "size=256m") as disk:
        save = disk / "run"
        with workspace.command(save) as command:
            command.until(lambda: tracked(save) == 4)
            ballast = fill(disk, 1 << 20)
            printed = command.wait(5)
        assert printed.count("miles: error:") == 1
        assert "could not be written" in printed
        assert "no space left on device: " in printed
        assert "MB are free; the last complete one is" in printed
        assert tracked(save) == 4
        assert sorted(path.name for path in save.glob("*iter_*")) == ["iter_0000004"]
        observed("disk full before a checkpoint", printed, "miles: error:", SINCE)

        with workspace.command(
            save, on_save_error="continue", save_hf=tmp_path / "run/export"
        ) as command:
            command.until(lambda: f"{save}/iter_0000004 (the same" in command.printed)
            ballast.unlink()
            ballast = fill(disk, 0)
            command.until(lambda: "metrics.jsonl cannot be written" in command.printed)
            command.until(lambda: "the run goes on (--on-save-error continue)" in command.printed)
            ballast.unlink()
            printed = command.wait(0)
        assert f"going on at step 4 from {save}/iter_0000004" in printed
        assert tracked(save) == NUM_STEPS
        marker = "the run goes on (--on-save-error continue)"
        observed(
            "disk full before a checkpoint, `--on-save-error continue`", printed, marker, NOTHING
        )
        assert printed.count("metrics.jsonl cannot be written") == 1
        assert printed.count("metrics.jsonl is written again") == 1
        shutil.copytree(tmp_path / "run/export", save / "export")
        require_same(save, unbroken)


def test_disk_fills_while_a_checkpoint_is_written(workspace: Workspace, tmp_path: Path) -> None:
    """There are bytes left, but no inodes: nothing says so beforehand."""
    with small_disk(tmp_path / "disk", "size=256m,nr_inodes=40") as disk:
        save, run = disk / "run", tmp_path / "run"
        with workspace.command(save, output_dir=run) as command:
            command.until(lambda: tracked(save) == 4)
            taken: list[Path] = []
            with contextlib.suppress(OSError):
                while True:
                    (disk / f"taken-{len(taken)}").touch()
                    taken.append(disk / f"taken-{len(taken)}")
            for file in taken[:3]:  # for the folder, the common part, and one file of tensors
                file.unlink()
            printed = command.wait(5)
        assert "could not be written" in printed
        assert "No space left on device" in printed
        assert tracked(save) == 4
        assert sorted(path.name for path in save.glob("*iter_*")) == ["iter_0000004"]
        observed("disk full while a checkpoint is written", printed, "miles: error:", SINCE)


def test_another_machine_goes_on_from_object_storage(
    workspace: Workspace, unbroken: Path, bucket: str, tmp_path: Path
) -> None:
    save = f"{bucket}/run"
    with workspace.command(save, keep_last=2) as command:
        command.until(lambda: f"checkpoint  {save}/iter_0000008" in command.printed)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()

    kept = int(storage.read_text(f"{save}/latest_checkpointed_iteration.txt"))
    assert kept >= 8

    env = {"MILES_CACHE": str(tmp_path / "empty")}
    with workspace.command(save, env=env, keep_last=2, save_hf=tmp_path / "export") as command:
        printed = command.wait(0)
    assert f"going on at step {kept} from {save}/iter_{kept:07d}" in printed

    fs, root = storage.filesystem(save)
    fs.invalidate_cache()
    names = {path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)}
    assert {name for name in names if name.startswith("iter_")} == {
        "iter_0000016",
        f"iter_{NUM_STEPS:07d}",
    }

    last = {path: entry["LastModified"] for path, entry in fs.find(root, detail=True).items()}
    tracker = last.pop(f"{root}/latest_checkpointed_iteration.txt")
    assert all(time <= tracker for path, time in last.items() if "/iter_" in path), (
        "the tracker is written last"
    )

    mine = [json.loads(line) for line in storage.read_text(f"{save}/metrics.jsonl").splitlines()]
    assert [line["data/step_fingerprint"] for line in mine] == [
        one["data/step_fingerprint"] for one in lines(unbroken)
    ]
    assert [line["sft/loss"] for line in mine] == [one["sft/loss"] for one in lines(unbroken)]
    assert weights(tmp_path / "export") == weights(unbroken / "export")

    observed(
        "driver killed, checkpoints on S3, another machine", printed, "going on at step", SINCE
    )
