"""Trainers of adapters for tests: the same frozen weights on any layout, and what was trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles.architecture.adapter import ATTENTION_TARGETS, TARGETS, AdapterShape
from miles.architecture.config import ModelShape
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig
from miles.train.types import AdapterSettings
from tests.support.ranks import NUM_SOURCES, SHAPE, batch, start, trainer_settings

ADAPTER = AdapterShape(rank=4, alpha=8.0, targets=TARGETS)
EXPERTS = replace(
    SHAPE, model_type="qwen3_moe", num_experts=8, moe_router_topk=3, moe_ffn_hidden_size=32
)
ON_ATTENTION = replace(ADAPTER, targets=ATTENTION_TARGETS)
"""Experts have no adapters."""
PROMPT = [1, 2, 3, 250, 7]


@dataclass(frozen=True)
class Case:
    """A model with an adapter, and how it is trained."""

    adapter: AdapterShape | None = ADAPTER
    dropout: float = 0.0
    shape: ModelShape = SHAPE
    layout: Layout = field(default_factory=lambda: Layout(1))
    recompute: RecomputeConfig = KEEP_ALL
    compute: ComputeConfig = AS_USUAL
    precision: Precision = Precision.FP32


@dataclass(frozen=True)
class Box:
    """A part of an adapter's tensor, after training."""

    key: str
    layer: tuple[int, ...]
    offsets: tuple[int, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Trained:
    """The outcome of some steps on a rank."""

    numbers: list[tuple[float, ...]]
    """loss and gradient norm of each step, then the loss of an evaluation"""
    boxes: list[Box]

    def require_close(self, whole: Trained, rtol: float, atol: float) -> None:
        """Compare with the same steps on one rank.

        Args:
            rtol: of losses and norms.
            atol: of weights. Adam's step of a tiny gradient is as large as of any other.
        """
        np.testing.assert_allclose(self.numbers, whole.numbers, rtol=rtol)
        tensors = {(box.key, box.layer): box.values for box in whole.boxes}
        for box in self.boxes:
            place = tuple(
                slice(begin, begin + size)
                for begin, size in zip(box.offsets, box.values.shape, strict=True)
            )
            expected = tensors[box.key, box.layer][place]
            np.testing.assert_allclose(box.values, expected, rtol=0, atol=atol, err_msg=box.key)


def new_trainer(case: Case, rank: int = 0) -> Any:
    """Return a trainer with the same frozen weights on any layout, in a process that is a rank."""
    from miles.train.rank.trainer import Trainer

    lora = None
    if case.adapter is not None:
        lora = AdapterSettings(case.adapter, case.dropout, seed=3)
    settings = trainer_settings(
        case.shape, case.layout, precision=case.precision, recompute=case.recompute, lora=lora
    )
    trainer = Trainer(replace(settings, compute=case.compute), rank)
    for box in boxes(trainer, of_adapters=False):
        box.data.copy_(torch.from_numpy(_values(box)))
    trainer.copy_weights_to_optimizer()
    return trainer


def boxes(trainer: Any, *, of_adapters: bool) -> list[Any]:
    """Return the boxes of a rank that are the adapters', or those of all other weights."""
    from miles.train.model.adapters import is_adapter
    from miles.train.rank.weight_boxes import weight_boxes

    return [box for box in weight_boxes(trainer.gpt) if is_adapter(box.key) == of_adapters]


def _values(box: Any) -> np.ndarray:
    """Return weights that depend on nothing but the place of each in the whole tensor."""
    content = hashlib.sha256(f"{box.key} {box.place}".encode()).digest()
    bits = np.full(box.data.shape, int.from_bytes(content[:8], "big"), np.uint64)
    for axis, (begin, size) in enumerate(zip(box.offsets, box.data.shape, strict=True)):
        numbers = np.arange(begin, begin + size, dtype=np.uint64)
        bits = bits + np.expand_dims(numbers, tuple(range(1, box.data.dim() - axis)))
        bits = (bits ^ (bits >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    uniform = (bits >> np.uint64(32)).astype(np.float32) / 2**31 - 1
    return 1 + uniform / 2 if "norm" in box.key else uniform / 6


def train(trainer: Any, steps: range) -> list[tuple[float, ...]]:
    """Train some steps; return loss and gradient norm of each."""
    numbers = []
    for step in steps:
        report, ranks = batch(step, trainer.layout)
        result = trainer.train_step(report, ranks[trainer.layout.data_rank(trainer.rank)])
        assert result.skip is None
        numbers.append((result.loss, result.grad_norm))
    return numbers


def evaluate(trainer: Any) -> float:
    """Return the mean loss of a step that is not trained on."""
    _, ranks = batch(50, trainer.layout)
    sums = trainer.evaluate([ranks[trainer.layout.data_rank(trainer.rank)]], NUM_SOURCES)
    return sum(sums.losses) / sum(sums.tokens)


def run(layout: Layout, rank: int, meeting: Path, case: Case, num_steps: int) -> Trained:
    """Train some steps on a rank (`ranks.run_ranks`)."""
    start(layout, rank, meeting)
    trainer = new_trainer(replace(case, layout=layout), rank)
    before = [box.data.clone() for box in boxes(trainer, of_adapters=False)]
    numbers = train(trainer, range(num_steps))
    loss = evaluate(trainer)

    for box, weight in zip(boxes(trainer, of_adapters=False), before, strict=True):
        assert torch.equal(box.data, weight), f"{box.key} is frozen"
    trainer.gather_weights()
    trained = [
        Box(box.key, box.place, box.offsets, box.data.float().numpy().copy())
        for box in boxes(trainer, of_adapters=True)
    ]
    return Trained([*numbers, (loss, loss)], trained)
