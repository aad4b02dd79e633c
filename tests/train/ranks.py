"""Trainers for tests: a tiny model, made-up batches, and gloo ranks in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miles.architecture import ModelShape
from miles.data.config import PackConfig
from miles.data.pack import micro_batch, pack
from miles.data.types import MicroBatch, StepReport
from miles.train.optimizer import OptimizerSettings
from miles.train.topology import Layout

SHAPE = ModelShape("qwen3", 2, 64, 128, 4, 2, 16, 512, 256, 1e6, 1e-6, True, True, False)
SETTINGS = OptimizerSettings(lr=1e-2, lr_warmup_iters=2, weight_decay=0.1)
NUM_STEPS = 10
NUM_SOURCES = 2


def batch(
    step: int, layout: Layout, lengths: Sequence[int] = (40, 3, 25, 9, 31, 17, 2), max_tokens: int = 64
) -> tuple[StepReport, list[tuple[MicroBatch, ...]]]:
    """The same samples for every layout, very unequal in what is trained; micro-batches for each data rank."""
    rng = np.random.default_rng(step)
    samples = [rng.integers(0, SHAPE.vocab_size, n).astype(np.int32) for n in lengths]
    masks = [(np.arange(n) >= n - 1 - (i % 3) * 7).astype(np.uint8) for i, n in enumerate(lengths)]
    sources = np.arange(len(lengths), dtype=np.int32) % NUM_SOURCES

    def build(indices: list[int]) -> MicroBatch:
        if not indices:
            return micro_batch(np.zeros(0, np.int32), np.zeros(0, np.uint8), [], np.zeros(0, np.int64), sources[:0])
        return micro_batch(
            np.concatenate([samples[i] for i in indices]),
            np.concatenate([masks[i] for i in indices]),
            np.array([lengths[i] for i in indices], np.int32),
            np.array(indices, np.int64),
            sources[indices],
        )

    config = PackConfig(dp_size=layout.data, max_tokens_per_gpu=max_tokens)
    packed = pack(np.array(lengths, np.int32), config)
    ranks = [tuple(build(indices) for indices in rank) for rank in packed]
    trained = int(sum(one.loss_mask.sum() for rank in ranks for one in rank))
    report = StepReport(
        step, 0.0, 0, len(lengths), len(lengths), sum(lengths), trained, 0, "", 1.0, 1.0, (4, 3), (0, 0), (0, 0), ()
    )
    return report, ranks


def make_trainer(layout: Layout, rank: int, address: str) -> Any:
    from miles.train.step import Trainer, start_rank

    start_rank(layout, rank, address, seed=7, timeout_minutes=2)
    return Trainer(SHAPE, layout, rank, SETTINGS, NUM_STEPS, NUM_SOURCES, bf16=False)


def free_address() -> str:
    """A port that nothing takes by itself meanwhile: below those that the system gives to outgoing connections."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def run_ranks(function: Callable[..., Any], layout: Layout, *arguments: Any) -> list[Any]:
    """`function(layout, rank, address, *arguments)` in a process a rank; the results, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        address = free_address()
        processes = []
        for rank in range(layout.world_size):
            job = (function.__module__, function.__qualname__, layout, rank, address, arguments)
            Path(folder, f"{rank}.job").write_bytes(pickle.dumps(job))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "tests.train.ranks", folder, str(rank)],
                    env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
                    cwd=Path(__file__).parents[2],
                )
            )
        codes = [process.wait(timeout=240) for process in processes]
        assert codes == [0] * layout.world_size, f"exit codes of the ranks: {codes}"
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(layout.world_size)]


def _main(folder: str, rank: str) -> None:
    import importlib

    module, name, layout, number, address, arguments = pickle.loads(Path(folder, f"{rank}.job").read_bytes())
    result = getattr(importlib.import_module(module), name)(layout, number, address, *arguments)
    Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
    # torch 2.13: gloo's threads, still running where Python ends, now and then abort the process (`terminate called
    # without an active exception`). The result is there; the rank leaves without that.
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # of saving a checkpoint
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
