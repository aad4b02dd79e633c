"""Gradients and weights that travel beside the computation change no bit, whoever reads them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.convert.export_plan import ExportPlan
from miles.train.compute_config import ComputeConfig
from miles.train.parallel_layout import Layout
from tests.support.ranks import NUM_SOURCES, SHAPE, batch, run_ranks, start, trainer_settings

TWO = Layout(2)
PLAIN = ComputeConfig(overlap_grad_reduce=False)
OVERLAPPED = ComputeConfig(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=1)
"""Each weight travels by itself: whoever does not wait for all of them reads old ones."""


@dataclass
class Seen:
    """What a rank saw of its weights, each time just after an optimizer step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    saved: list[dict[str, np.ndarray]] = field(default_factory=list)
    """the weights of a state to save"""
    evaluated: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    num_buckets: int = 0


def run(
    layout: Layout, rank: int, meeting: Path, compute: ComputeConfig, folder: str, is_resumed: bool
) -> Seen:
    """Train, and after each step read the weights in another way."""
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    settings = trainer_settings(SHAPE, layout)
    # Buckets divide a gradient's norm otherwise, which rounds: it must not reach the weights.
    unclipped = replace(settings.optimizer, clip_grad=0.0)
    trainer = Trainer(replace(settings, optimizer=unclipped, compute=compute), rank)
    seen = Seen(num_buckets=len(trainer.model.bucket_groups))

    def train(number: int) -> None:
        # A bucket must wait for the last micro-batch, however many a step has.
        report, ranks = batch(number, layout, max_tokens=(64, 40, 200)[number % 3])
        result = trainer.train_step(report, ranks[layout.data_rank(rank)])
        seen.losses.append(result.loss)
        seen.grad_norms.append(result.grad_norm)

    if is_resumed:
        found = checkpoint_folder.find(folder)
        assert found is not None
        checkpoint_load.load(trainer, found, model_only=False)
    else:
        train(0)
        train(1)
        checkpoint_writer.save(trainer, folder, 2, {})

    train(2)
    seen.saved.append(weights_to_save(trainer))
    train(3)
    export(trainer, Path(f"{folder}-export-{is_resumed}"))
    train(4)
    _, ranks = batch(4, layout)
    sums = trainer.evaluate([ranks[layout.data_rank(rank)]], NUM_SOURCES)
    seen.evaluated += sums.losses
    train(5)
    seen.answers = trainer.generate([[1, 2, 3], [5, 6, 7, 8]], [], 4)
    train(6)
    skip(trainer)
    seen.saved.append(weights_to_save(trainer))
    train(7)
    seen.saved.append(weights_to_save(trainer))
    return seen


def weights_to_save(trainer: Any) -> dict[str, np.ndarray]:
    from miles.train.rank import checkpoint_load

    state = checkpoint_load.state_to_save(trainer, 1, {}, model_only=True)["model"]
    return {
        name: value.data.numpy(force=True).copy()
        for name, value in state.items()
        if torch.is_tensor(value.data)
    }


def export(trainer: Any, folder: Path) -> None:
    """Write the weights of all ranks in the format of Hugging Face."""
    from miles.train.rank import weight_boxes

    if trainer.rank == 0:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
        plan = ExportPlan(str(folder), SHAPE, defaultdict(lambda: torch.float32))
        plan.create(folder).close()
    torch.distributed.barrier()
    assert weight_boxes.write_weights(trainer, folder).failure is None
    torch.distributed.barrier()


def skip(trainer: Any) -> None:
    """Train a step whose gradient is not finite: it takes no optimizer step."""
    first = next(iter(trainer.gpt.parameters()))
    hook = first.register_hook(lambda gradient: gradient * float("nan"))
    report, ranks = batch(9, trainer.layout)
    result = trainer.train_step(report, ranks[trainer.layout.data_rank(trainer.rank)])
    hook.remove()
    assert result.skip


@pytest.mark.slow
def test_overlapped_communication_changes_no_bit(tmp_path: Path) -> None:
    """Not while training, in no reader of weights, and in no run that continues from the other."""
    plain = run_ranks(run, TWO, PLAIN, str(tmp_path / "plain"), False)
    overlapped = run_ranks(run, TWO, OVERLAPPED, str(tmp_path / "overlapped"), False)
    assert overlapped[0].num_buckets > 15 > plain[0].num_buckets
    for rank in range(TWO.world_size):
        require_equal(overlapped[rank], plain[rank])
    require_equal_files(tmp_path / "overlapped-export-False", tmp_path / "plain-export-False")

    continued = run_ranks(run, TWO, PLAIN, str(tmp_path / "overlapped"), True)
    for rank in range(TWO.world_size):
        first = plain[rank]
        require_equal(
            continued[rank],
            replace(first, losses=first.losses[2:], grad_norms=first.grad_norms[2:]),
        )
    require_equal_files(tmp_path / "overlapped-export-True", tmp_path / "plain-export-False")


def require_equal(seen: Seen, expected: Seen) -> None:
    assert seen.losses == expected.losses
    np.testing.assert_allclose(seen.grad_norms, expected.grad_norms, rtol=1e-5)
    assert seen.evaluated == expected.evaluated
    assert seen.answers == expected.answers
    for own, other in zip(seen.saved, expected.saved, strict=True):
        assert own.keys() == other.keys()
        for name, weight in own.items():
            np.testing.assert_array_equal(weight, other[name], err_msg=name)


def require_equal_files(folder: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
