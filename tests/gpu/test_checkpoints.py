"""Checkpoints from a GPU: resumed bit by bit, and written while the next steps are computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.common import checkpoint_folder
from miles.common.checkpoint_tracker import write_tracker
from miles.train.model import device
from miles.train.precision import Precision
from miles.train.types import SaveStage
from tests.support.one_rank import new_trainer, train

EXTRA: dict[str, Any] = {"cursor": {"consumed_rows": 14}}
FAMILY = "qwen3-tied"
WRITER_SECONDS = 60


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Use only kernels that give the same bits each time, as `--deterministic-mode` does."""
    from miles.train.rank.rank_process import be_deterministic

    be_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def weights_of(trainer: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trainer.gpt.parameters()]


def bits(results: list[Any]) -> list[tuple[float, float]]:
    return [(result.loss, result.grad_norm) for result in results]


def resume(trainer: Any, folder: Path) -> None:
    """Load the newest checkpoint of a folder, optimizer and all."""
    from miles.train.rank import checkpoint_load

    found = checkpoint_folder.find(str(folder))
    assert found is not None
    checkpoint_load.load(trainer, found, model_only=False)


@pytest.mark.parametrize("family", [FAMILY, "qwen3_moe"])
@pytest.mark.usefixtures("deterministic")
def test_a_resumed_run_goes_on_bit_by_bit(family: str, families: Path, tmp_path: Path) -> None:
    from miles.train.rank.checkpoint_writer import save

    straight = new_trainer(families / family, Precision.BF16)
    train(straight, [0, 1])
    save(straight, str(tmp_path), 2, EXTRA)
    expected = bits(train(straight, [2, 3]))

    resumed = new_trainer(families / family, Precision.BF16)
    resume(resumed, tmp_path)
    assert bits(train(resumed, [2, 3])) == expected
    assert all(map(torch.equal, weights_of(straight), weights_of(resumed)))


def test_a_checkpoint_is_written_while_steps_go_on(families: Path, tmp_path: Path) -> None:
    """The writer is a fork of a process that has a GPU; it must not touch it."""
    from miles.train.rank.checkpoint_writer import CheckpointWriter

    trainer = new_trainer(families / FAMILY, Precision.BF16)
    train(trainer, [0])
    saved = weights_of(trainer)
    writer = CheckpointWriter(trainer)
    assert writer.begin(str(tmp_path), 1, EXTRA) is None
    train(trainer, [1, 2])
    assert not all(map(torch.equal, saved, weights_of(trainer)))

    deadline = time.monotonic() + WRITER_SECONDS
    while writer.stage() is SaveStage.WRITING:
        assert time.monotonic() < deadline, "the writer does not end"
        time.sleep(0.05)
    assert writer.seal() is None
    write_tracker(str(tmp_path), 1)

    other = new_trainer(families / FAMILY, Precision.BF16)
    resume(other, tmp_path)
    assert all(map(torch.equal, saved, weights_of(other)))


def test_a_float32_run_takes_the_weights_of_a_bfloat16_checkpoint(
    families: Path, tmp_path: Path
) -> None:
    from miles.train.rank import checkpoint_load
    from miles.train.rank.checkpoint_writer import save

    trainer = new_trainer(families / FAMILY, Precision.BF16)
    train(trainer, [0])
    save(trainer, str(tmp_path), 1, EXTRA)

    whole = new_trainer(families / FAMILY, Precision.FP32)
    found = checkpoint_folder.find(str(tmp_path))
    assert found is not None
    checkpoint_load.load(whole, found, model_only=True)
    for weight, half in zip(weights_of(whole), weights_of(trainer), strict=True):
        assert weight.dtype is torch.float32
        assert weight.device.type == device.torch_device()
        assert torch.equal(weight, half.float())
