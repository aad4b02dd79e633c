"""A step that trains adapters, against one that trains all weights, and against PEFT's.

    python benchmarks/lora_step.py

One process on one CPU core, the same tokens in float32. Ours packs the samples into one
micro-batch; PEFT's model gets them as one padded batch, as long as all samples are equally long,
which they are: nothing is lost to padding. They take turns. The times are medians of
some steps, in seconds of the core; the ratios are what is claimed.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Bar, add_check_flag, exit_where_missed, print_bars
from rich.console import Console

from miles.architecture.adapter import TARGETS, AdapterShape
from miles.architecture.families import read_shape
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.data.packing.micro_batch import micro_batch
from miles.data.types import (
    MicroBatch,
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
)
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.types import AdapterSettings, TrainerSettings

ONE_RANK = Layout(1)
NUM_WARM_UP = 2
"""Steps before those that are timed."""
ADAPTER = AdapterShape(rank=16, alpha=16.0, targets=TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sample-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--max-of-full", type=float, default=0.9)
    parser.add_argument("--max-of-peft", type=float, default=1.2)
    add_check_flag(parser)
    flags = parser.parse_args()

    warnings.simplefilter("ignore")
    ids = np.random.default_rng(0).integers(0, 1000, (flags.samples, flags.sample_tokens))
    with tempfile.TemporaryDirectory(prefix="miles-lora-") as folder:
        _write_model(Path(folder), flags)
        full, lora, peft = _seconds(Path(folder), ids, flags.steps)

    print(
        f"{ids.size:,} tokens a step, {flags.layers} layers of {flags.hidden_size}: all weights "
        f"{full * 1e3:,.0f} ms, LoRA {lora * 1e3:,.0f} ms, PEFT's {peft * 1e3:,.0f} ms"
    )
    bars = [
        Bar("of the time of a step that trains all weights", lora / full, flags.max_of_full),
        Bar("of the time of PEFT's step", lora / peft, flags.max_of_peft),
    ]
    print_bars(bars, Console(width=100))
    if flags.check:
        exit_where_missed(bars)


def _write_model(folder: Path, flags: argparse.Namespace) -> None:
    """Write a model with random weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=flags.hidden_size,
        intermediate_size=3 * flags.hidden_size,
        num_hidden_layers=flags.layers,
        num_attention_heads=flags.hidden_size // 64,
        num_key_value_heads=flags.hidden_size // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def _seconds(folder: Path, ids: np.ndarray, num_steps: int) -> tuple[float, float, float]:
    """Return the seconds of a step: of all weights, of adapters, of PEFT's adapters."""
    from miles.train.rank.rank_process import start_rank

    listener = socket.create_server(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    start_rank(ONE_RANK, 0, address, seed=1, timeout_minutes=4, listener=listener)

    batch = _batch(ids)
    lora = AdapterSettings(ADAPTER, dropout=0.0, seed=1)
    steps = [
        _our_step(folder, None, batch),
        _our_step(folder, lora, batch),
        _peft_step(folder, ids),
    ]

    seconds: list[list[float]] = [[], [], []]
    for _ in range(num_steps + NUM_WARM_UP):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    full, adapters, peft = (statistics.median(taken[NUM_WARM_UP:]) for taken in seconds)
    return full, adapters, peft


def _batch(ids: np.ndarray) -> MicroBatch:
    """Return all samples in one micro-batch, every token trained."""
    num_samples, num_tokens = ids.shape
    return micro_batch(
        ids.reshape(-1).astype(np.int32),
        np.ones(ids.size, np.uint8),
        np.full(num_samples, num_tokens, np.int32),
        np.arange(num_samples),
        np.zeros(num_samples, np.int32),
    )


def _our_step(
    folder: Path, lora: AdapterSettings | None, batch: MicroBatch
) -> Callable[[], object]:
    """Return a function that takes a step of a trainer."""
    from miles.train.rank import checkpoint_load
    from miles.train.rank.trainer import Trainer

    settings = TrainerSettings(
        read_shape(str(folder)), ONE_RANK, OptimizerSettings(), 100, 1, Precision.FP32, lora=lora
    )
    trainer = Trainer(settings, 0)
    weights = SavedCheckpoint(str(folder), 0, None, is_hugging_face=True)
    checkpoint_load.load(trainer, weights, model_only=True)
    num_tokens, num_trained = len(batch.input_ids), int(batch.loss_mask.sum())
    report = StepReport(
        StepPosition(0, 0.0, 0),
        StepRows((1,), (0,), (0,), ()),
        StepContent(len(batch.row_ids), num_tokens, 0, num_trained, (num_trained,), 0, ""),
        StepPacking(1.0, 1.0),
        StepTiming({}),
    )
    return lambda: trainer.train_step(report, [batch])


def _peft_step(folder: Path, ids: np.ndarray) -> Callable[[], object]:
    """Return a function that takes a step of PEFT's model."""
    import peft
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, target_modules=list(TARGETS))
    model = peft.get_peft_model(base, config)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    inputs = torch.from_numpy(ids)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=inputs, labels=inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
