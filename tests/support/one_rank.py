"""A process that is the only rank, and the numbers of some steps in it: on a GPU and on a CPU.

python -m tests.support.one_rank FOLDER      the numbers of every model in it, as JSON, for
                                             tests/gpu, whose own process has a GPU
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from miles.architecture.families import read_shape
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.types import TrainerSettings
from tests.support.models import make_hf
from tests.support.ranks import NUM_SOURCES, NUM_STEPS, SETTINGS, SHAPE, batch

ALONE = Layout(1)

FAMILIES = {
    "qwen3-tied": ("qwen3", True),
    "qwen3-untied": ("qwen3", False),
    "qwen2-tied": ("qwen2", True),
    "qwen2-untied": ("qwen2", False),
    "llama-tied": ("llama", True),
    "llama-untied": ("llama", False),
    "qwen3_moe": ("qwen3_moe", False),
}
"""Folder -> the family, and whether its embeddings are tied."""

PROMPTS = ((1, 2, 3), (5, 6, 7, 8))


@dataclass(frozen=True)
class Numbers:
    """The numbers of a model's first steps."""

    losses: list[float]
    grad_norms: list[float]
    eval_loss: float
    """after the steps"""
    answers: list[list[int]]
    """to `PROMPTS`, before the steps"""


def start_alone() -> None:
    """Make this process the only rank."""
    from miles.train.rank.rank_process import start_rank

    listener = socket.create_server(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    start_rank(ALONE, 0, address, seed=7, timeout_minutes=4, listener=listener)


def write_families(folder: Path) -> None:
    """Write a tiny model of every family."""
    for name, (model_type, is_tied) in FAMILIES.items():
        make_hf(folder / name, model_type, tied=is_tied, vocab_size=SHAPE.vocab_size)


def new_trainer(
    folder: Path,
    precision: Precision = Precision.FP32,
    *,
    compute: ComputeConfig = AS_USUAL,
    optimizer: OptimizerSettings = SETTINGS,
) -> Any:
    """Return a trainer with the weights of a Hugging Face folder."""
    from miles.common.checkpoint_folder import SavedCheckpoint
    from miles.train.rank import checkpoint_load
    from miles.train.rank.trainer import Trainer

    settings = TrainerSettings(
        read_shape(str(folder)),
        ALONE,
        optimizer,
        NUM_STEPS,
        NUM_SOURCES,
        precision,
        compute=compute,
    )
    trainer = Trainer(settings, 0)
    weights = SavedCheckpoint(str(folder), 0, None, is_hugging_face=True)
    checkpoint_load.load(trainer, weights, model_only=True)
    return trainer


def train(trainer: Any, steps: Sequence[int]) -> list[Any]:
    """Train on some steps, which are not skipped; return their results."""
    results = []
    for step in steps:
        report, (micro_batches,) = batch(step, ALONE)
        results.append(trainer.train_step(report, micro_batches))
        assert results[-1].skip is None
    return results


def evaluate(trainer: Any) -> float:
    """Return the mean loss over the tokens of two steps that are not trained on."""
    held_out = [batch(step, ALONE)[1][0] for step in (100, 101)]
    sums = trainer.evaluate(held_out, NUM_SOURCES)
    return sum(sums.losses) / sum(sums.tokens)


def numbers_of(folder: Path, precision: Precision, **settings: Any) -> Numbers:
    """Return the numbers of a model's first three steps."""
    trainer = new_trainer(folder, precision, **settings)
    answers = trainer.generate(PROMPTS, [], 5)
    results = train(trainer, range(3))
    return Numbers(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        eval_loss=evaluate(trainer),
        answers=answers,
    )


def main() -> None:
    torch.set_num_threads(2)
    start_alone()
    folder = Path(sys.argv[1])
    numbers = {name: asdict(numbers_of(folder / name, Precision.FP32)) for name in FAMILIES}
    (folder / "numbers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
