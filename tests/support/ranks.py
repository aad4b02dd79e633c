"""Trainers for tests: a tiny model, made-up batches, and gloo ranks in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miles.architecture.config import ModelShape
from miles.data.config import PackConfig
from miles.data.packing.pack import micro_batch, pack
from miles.data.types import (
    MicroBatch,
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
)
from miles.train.config import KEEP_ALL, OptimizerSettings, RecomputeConfig
from miles.train.parallel_layout import Layout
from miles.train.types import TrainerSettings

SHAPE = ModelShape("qwen3", 2, 64, 128, 4, 2, 16, 512, 256, 1e6, 1e-6, True, True, False)
SETTINGS = OptimizerSettings(lr=1e-2, lr_warmup_iters=2, weight_decay=0.1)
NUM_STEPS = 10
NUM_SOURCES = 2


def batch(
    step: int,
    layout: Layout,
    lengths: Sequence[int] = (40, 3, 25, 9, 31, 17, 2),
    max_tokens: int = 64,
) -> tuple[StepReport, list[tuple[MicroBatch, ...]]]:
    """The same samples for every layout, very unequal in what is trained; micro-batches for each data rank."""
    rng = np.random.default_rng(step)
    samples = [rng.integers(0, SHAPE.vocab_size, n).astype(np.int32) for n in lengths]
    masks = [(np.arange(n) >= n - 1 - (i % 3) * 7).astype(np.uint8) for i, n in enumerate(lengths)]
    sources = np.arange(len(lengths), dtype=np.int32) % NUM_SOURCES

    def build(indices: list[int]) -> MicroBatch:
        if not indices:
            return micro_batch(
                np.zeros(0, np.int32), np.zeros(0, np.uint8), [], np.zeros(0, np.int64), sources[:0]
            )
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
        position=StepPosition(index=step, epoch=0.0, next_row=0),
        rows=StepRows(read=(4, 3), truncated=(0, 0), held_out=(0, 0), rejects=()),
        content=StepContent(
            num_samples=len(lengths),
            num_tokens=sum(lengths),
            num_causal_pairs=0,
            num_trained_tokens=trained,
            source_trained_tokens=(0, 0),
            num_straddling_tokens=0,
            fingerprint="",
        ),
        packing=StepPacking(fill=1.0, imbalance=1.0),
        timing=StepTiming(stage_seconds={}),
    )
    return report, ranks


def trainer_settings(
    shape: ModelShape,
    layout: Layout,
    *,
    num_sources: int = NUM_SOURCES,
    bf16: bool = False,
    recompute: RecomputeConfig = KEEP_ALL,
) -> TrainerSettings:
    return TrainerSettings(shape, layout, SETTINGS, NUM_STEPS, num_sources, bf16, recompute)


def make_trainer(layout: Layout, rank: int, meeting: Path) -> Any:
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    return Trainer(trainer_settings(SHAPE, layout), rank)


def start(layout: Layout, rank: int, meeting: Path) -> None:
    """Joins the group of the ranks that name the same file. Rank 0 listens at a port that the system chooses and
    writes its address there: a port chosen beforehand may be taken by then."""
    from miles.train.rank.rank_process import start_rank

    listener = None
    if rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        draft = meeting.with_suffix(".draft")
        draft.write_text(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        draft.rename(meeting)
    deadline = time.monotonic() + 120
    while not meeting.exists():
        assert time.monotonic() < deadline, f"rank 0 wrote no {meeting}"
        time.sleep(0.02)
    start_rank(layout, rank, meeting.read_text(), seed=7, timeout_minutes=2, listener=listener)


def run_ranks(function: Callable[..., Any], layout: Layout, *arguments: Any) -> list[Any]:
    """`function(layout, rank, meeting, *arguments)` in a process a rank; the results, by rank.

    `meeting` is a file in an empty folder of this call's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(layout.world_size):
            job = (function.__module__, function.__qualname__, layout, rank, arguments)
            Path(folder, f"{rank}.job").write_bytes(pickle.dumps(job))
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-W",
                        "ignore",
                        "-m",
                        "tests.support.ranks",
                        folder,
                        str(rank),
                    ],
                    env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
                    cwd=Path(__file__).parents[2],
                )
            )
        try:
            codes = [process.wait(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * layout.world_size, f"exit codes of the ranks: {codes}"
        return [
            pickle.loads(Path(folder, f"{rank}.result").read_bytes())
            for rank in range(layout.world_size)
        ]


def _main(folder: str, rank: str) -> None:
    import importlib

    module, name, layout, number, arguments = pickle.loads(Path(folder, f"{rank}.job").read_bytes())
    result = getattr(importlib.import_module(module), name)(
        layout, number, Path(folder, "meeting"), *arguments
    )
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
