"""A training step on a GPU: the loss in pieces, a skipped step, float16, offloaded Adam."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.train.compute_config import ComputeConfig
from miles.train.precision import Precision
from miles.train.types import SkipReason
from tests.support.one_rank import ALONE, Numbers, new_trainer, numbers_of, train
from tests.support.ranks import SETTINGS, batch


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3-untied"])
def test_the_loss_in_pieces_is_the_whole_one(family: str, families: Path) -> None:
    whole = numbers_of(families / family, Precision.FP32, compute=ComputeConfig(loss_chunk_size=0))
    pieces = numbers_of(families / family, Precision.FP32, compute=ComputeConfig(loss_chunk_size=3))
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-5)
    assert pieces.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)
    assert pieces.eval_loss == pytest.approx(whole.eval_loss, rel=1e-5)


def test_grouped_experts_are_those_one_by_one(families: Path) -> None:
    one_by_one, grouped = (
        numbers_of(
            families / "qwen3_moe",
            Precision.BF16,
            compute=ComputeConfig(grouped_experts=is_grouped),
        )
        for is_grouped in (False, True)
    )
    assert grouped.losses == pytest.approx(one_by_one.losses, rel=5e-3)
    assert grouped.grad_norms == pytest.approx(one_by_one.grad_norms, rel=3e-2)


def weights_of(trainer: Any) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trainer.gpt.parameters()]


def test_a_step_with_nan_names_its_rows_and_changes_no_weight(families: Path) -> None:
    trainer = new_trainer(families / "qwen3-tied", Precision.BF16)
    train(trainer, [0])
    report, (micro_batches,) = batch(1, ALONE)
    poisoned = int(micro_batches[0].input_ids[0])
    before = weights_of(trainer)

    embedding = trainer.gpt.embedding.word_embeddings
    handle = embedding.register_forward_hook(
        lambda layer, inputs, output: output.masked_fill(
            (inputs[0] == poisoned)[..., None], float("nan")
        )
    )
    result = trainer.train_step(report, micro_batches)
    handle.remove()

    assert result.skip is not None
    assert result.skip.reason is SkipReason.LOSS_NOT_FINITE
    assert micro_batches[0].row_ids[0] in result.skip.row_ids
    assert len(result.skip.row_ids) < report.content.num_samples
    assert all(map(torch.equal, before, weights_of(trainer)))
    train(trainer, [2])
    assert not all(map(torch.equal, before, weights_of(trainer)))


def test_float16_trains(families: Path, on_cpu: dict[str, Numbers]) -> None:
    found = numbers_of(families / "qwen3-untied", Precision.FP16)
    expected = on_cpu["qwen3-untied"]
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=5e-2)


def test_adam_on_the_cpu_takes_the_same_steps(families: Path) -> None:
    offloaded = replace(SETTINGS, precision_aware=True, cpu_offload=True)
    on_gpu = numbers_of(families / "qwen3-tied", Precision.BF16)
    on_cpu = numbers_of(families / "qwen3-tied", Precision.BF16, optimizer=offloaded)
    assert on_cpu.losses == pytest.approx(on_gpu.losses, rel=1e-3)
    assert on_cpu.grad_norms == pytest.approx(on_gpu.grad_norms, rel=1e-2)
