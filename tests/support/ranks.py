"""Trainers for tests: a tiny model, random batches, and gloo ranks in processes of their own."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from miles.architecture.config import ModelShape
from miles.data.config import PackConfig
from miles.data.packing.micro_batch import micro_batch
from miles.data.packing.pack import pack
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
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig
from miles.train.types import AdapterSettings, TrainerSettings
from tests.support.processes import PROJECT, processes, wait_until

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
    """Return a step's report and, for each data rank, its micro-batches.

    The samples are the same for every layout, and very unequal in what is trained.
    """
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
    precision: Precision = Precision.FP32,
    recompute: RecomputeConfig = KEEP_ALL,
    lora: AdapterSettings | None = None,
) -> TrainerSettings:
    return TrainerSettings(
        shape, layout, SETTINGS, NUM_STEPS, num_sources, precision, recompute, lora=lora
    )


def make_trainer(layout: Layout, rank: int, meeting: Path) -> Any:
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    return Trainer(trainer_settings(SHAPE, layout), rank)


def start(layout: Layout, rank: int, meeting: Path) -> None:
    """Join the group of the ranks that name the same file.

    Rank 0 listens at a port that the system chooses, and writes its address to the file: a port
    chosen beforehand may be taken by then.
    """
    from miles.train.rank.rank_process import start_rank

    listener = None
    if rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        draft = meeting.with_suffix(".draft")
        draft.write_text(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        draft.rename(meeting)
    wait_until(meeting.exists, lambda: f"rank 0 wrote no {meeting}")
    start_rank(layout, rank, meeting.read_text(), seed=7, timeout_minutes=4, listener=listener)


# --- processes that stay alive between calls


def run_ranks(function: Callable[..., Any], layout: Layout, *arguments: Any) -> list[Any]:
    """Call a function in a process for each rank; return the results by rank.

    The processes stay for the next call, so that they import torch and Megatron once; they leave
    the groups of one call before the next.

    Args:
        function: called as `function(layout, rank, meeting, *arguments)`, where `meeting` is a file
        in
            an empty folder of this call's own.
    """
    while len(_workers) < layout.world_size:
        _workers.append(_Worker())
    workers = _workers[: layout.world_size]

    with tempfile.TemporaryDirectory() as folder:
        for rank, worker in enumerate(workers):
            job = (function.__module__, function.__qualname__, layout, rank, arguments)
            Path(folder, f"{rank}.job").write_bytes(pickle.dumps(job))
            worker.begin(folder, rank)
        try:
            outcomes = [worker.wait() for worker in workers]
        except BaseException:
            end_ranks()
            raise
        if not all(outcomes):
            end_ranks()  # a rank may still be in a group with one that failed
        assert all(outcomes), f"ranks that ended well: {outcomes}"
        results = [Path(folder, f"{rank}.result") for rank in range(layout.world_size)]
        return [pickle.loads(result.read_bytes()) for result in results]


def end_ranks() -> None:
    """End the processes of all ranks."""
    while _workers:
        _workers.pop().end()


class _Worker:
    """A process that runs one job after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from tests.support.ranks import work; work()"],
            env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, folder: str, rank: int) -> None:
        """Have the process run the job of a rank that lies in a folder."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{folder} {rank}\n")
            self._process.stdin.flush()

    def wait(self) -> bool:
        """Wait for the job's end; return whether it went well."""
        assert self._process.stdout is not None
        return self._process.stdout.readline() == "done\n"

    def end(self) -> None:
        """Kill the process and its children, which save checkpoints."""
        for process in [*processes("", self._process.pid), self._process]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()


_workers: list[_Worker] = []
atexit.register(end_ranks)


def work() -> None:
    """Run the jobs that the standard input names, in a rank's process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a job prints is no answer

    for line in sys.stdin:
        folder, rank = line.rsplit(" ", 1)
        try:
            _run_job(Path(folder), int(rank))
        except BaseException:
            traceback.print_exc()
            # torch 2.13: gloo's threads, still running where Python ends, now and then abort the
            # process (`terminate called without an active exception`). It leaves without that.
            os._exit(1)
        print("done", file=answers, flush=True)

    os._exit(0)


def _run_job(folder: Path, rank: int) -> None:
    """Run a job, write its result, and leave the groups."""
    from miles.train.model import process_groups

    module, name, layout, number, arguments = pickle.loads((folder / f"{rank}.job").read_bytes())
    function = getattr(importlib.import_module(module), name)
    result = function(layout, number, folder / "meeting", *arguments)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    process_groups.shutdown()
