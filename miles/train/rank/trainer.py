"""One rank's trainer: model, optimizer, and the step over a rank's micro-batches. No Ray in here."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.data.types import DUMMY_ROW_ID, MicroBatch, StepReport
from miles.train.config import KEEP_ALL, OptimizerSettings, RecomputeConfig
from miles.train.model import megatron_on_cpu, process_groups
from miles.train.model.build import build_model, forward_packed, padded, single
from miles.train.model.loss import SourceSums, masked_sum, rows_not_finite, sum_by_source
from miles.train.model.optimizer import build_optimizer
from miles.train.parallel_layout import Layout
from miles.train.rank.generate import greedy

NOTHING_TO_TRAIN = "nothing to train"
"""Why a step of dropped rows alone is skipped; no fault of the model's."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank of the last pipeline stage."""

    source_losses: tuple[float, ...]
    """loss summed over each source's trained tokens"""
    source_tokens: tuple[int, ...]
    grad_norm: float
    lr: float
    """the rate that this step used"""
    skipped: str
    """why no optimizer step was taken; empty: it was"""
    skipped_rows: tuple[int, ...]
    """row ids whose loss is not finite; of a step whose gradient alone is not, all"""
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(self.source_tokens)

    @property
    def loss(self) -> float:
        """mean over all trained tokens of the global batch; NaN where there are none"""
        return sum(self.source_losses) / self.num_tokens if self.num_tokens else float("nan")


class Trainer:
    """Model, optimizer and schedule of one rank. `topology.initialize` must have been called.

    Args:
        shape: of the model.
        layout: of all ranks.
        rank: this one.
        settings: of the optimizer.
        num_steps: of the whole run, for the schedule.
        num_sources: of the data mixture.
        bf16: mixed precision; else float32 throughout.
        recompute: which activations are computed again in the backward pass.

    Raises:
        ConfigError: the model cannot be cut so.
    """

    def __init__(
        self,
        shape: ModelShape,
        layout: Layout,
        rank: int,
        settings: OptimizerSettings,
        num_steps: int,
        num_sources: int,
        *,
        bf16: bool,
        recompute: RecomputeConfig = KEEP_ALL,
    ) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self.shape, self.layout, self.rank = shape, layout, rank
        self.num_sources = num_sources
        model = build_model(shape, layout, bf16=bf16, recompute=recompute)
        self.model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
            ),
            model,
        )
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer, self.scheduler = build_optimizer(self.model, settings, num_steps, bf16=bf16)

    @property
    def gpt(self) -> Any:
        """The `GPTModel` inside the wrappers."""
        return self.model.module

    def weights_loaded(self) -> None:
        """To be called after the model's weights were replaced: the optimizer keeps its own copy of them."""
        self.optimizer.reload_model_params()

    def train_step(self, report: StepReport, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, one optimizer step.

        A step in which nothing trains, or whose loss or gradient is not finite, takes no optimizer step (and decays
        no weight); the schedule moves on, so that step k has the same rate in every run.
        """
        started = time.perf_counter()
        lr = float(self.optimizer.param_groups[0]["lr"])
        if report.content.num_trained_tokens == 0:
            self.scheduler.step(1)
            zeros = (0,) * self.num_sources
            return StepResult(
                zeros, zeros, 0.0, lr, NOTHING_TO_TRAIN, (), time.perf_counter() - started
            )

        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [padded(batch, self.layout) for batch in micro_batches]
        by_segment = self._run(batches, forward_only=False)
        sums = self._reduced(by_segment, batches, self.num_sources)
        skipped, grad_norm = "", float("nan")
        if not torch.isfinite(sums.vector).all():
            skipped = "the loss is not finite"
        else:
            self.optimizer.prepare_grads()
            grad_norm = float(
                self.optimizer.get_grad_norm()
            )  # over all ranks: they agree on what follows
            if math.isfinite(grad_norm):
                self.optimizer.step()
            else:
                skipped = "the gradient is not finite"
        self.scheduler.step(1)
        rows = self._rows_to_blame(by_segment, batches) if skipped else ()
        assert sum(sums.tokens) == report.content.num_trained_tokens, (
            "the ranks trained other tokens than the step holds"
        )
        seconds = time.perf_counter() - started
        return StepResult(
            tuple(sums.losses), tuple(sums.tokens), grad_norm, lr, skipped, rows, seconds
        )

    def evaluate(self, steps: Iterable[Sequence[MicroBatch]], num_sources: int) -> SourceSums:
        """Loss sums and token counts by source, over all data ranks, without a backward pass.

        Args:
            steps: of each step this rank's micro-batches, as many on every rank.
            num_sources: of the evaluation set.
        """
        self.model.eval()
        total = SourceSums(torch.zeros(2 * num_sources, dtype=torch.float64, device=_device()))
        with torch.no_grad():
            for micro_batches in steps:
                batches = [padded(batch, self.layout) for batch in micro_batches]
                total.vector.add_(
                    self._reduced(
                        self._run(batches, forward_only=True), batches, num_sources
                    ).vector
                )
        return total

    def generate(
        self, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_tokens: int
    ) -> list[list[int]]:
        """The most likely continuations, token by token (`generate.greedy`)."""
        self.model.eval()
        return greedy(self.model, self.layout, self.rank, prompts, stop_ids, max_tokens)

    def logits(self, input_ids: Sequence[int]) -> np.ndarray:
        """Logits of one sequence, float32 [tokens, vocabulary]; without tensor or pipeline parallelism only."""
        assert self.layout.tensor == self.layout.pipeline == 1
        self.model.eval()
        with torch.no_grad():
            out: np.ndarray = (
                forward_packed(self.gpt, single(input_ids), labels=False)[0].float().cpu().numpy()
            )
        return out

    def _run(self, batches: Sequence[MicroBatch], *, forward_only: bool) -> list[Tensor]:
        """float64 [2, segments] of each micro-batch: loss sums and counts; none but on the last pipeline stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        outputs: list[Tensor] = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=max(len(batch.input_ids) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return outputs

    def _forward_step(self, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)

        def loss(token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return masked_sum(token_losses, batch)

        return forward_packed(model, batch, labels=True), loss

    def _reduced(
        self, by_segment: list[Tensor], batches: Sequence[MicroBatch], num_sources: int
    ) -> SourceSums:
        """The sums of all data ranks, on every rank."""
        from megatron.core import parallel_state

        sums = SourceSums(torch.zeros(2 * num_sources, dtype=torch.float64, device=_device()))
        if self.layout.is_last_stage(self.rank):
            for one, batch in zip(by_segment, batches, strict=True):
                sums.vector.add_(sum_by_source(one, batch, num_sources))
            sums.all_reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.layout.pipeline > 1:  # all stages must agree on whether to step
            torch.distributed.broadcast(
                sums.vector,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return sums

    def _rows_to_blame(
        self, by_segment: list[Tensor], batches: Sequence[MicroBatch]
    ) -> tuple[int, ...]:
        """Of a skipped step, from all data ranks; nothing but on the last pipeline stage."""
        from megatron.core import parallel_state

        if not self.layout.is_last_stage(self.rank):
            return ()
        pairs = list(zip(by_segment, batches, strict=True))
        mine = [
            [row for one, batch in pairs for row in rows_not_finite(one, batch)],
            [int(row) for batch in batches for row in batch.row_ids if row != DUMMY_ROW_ID],
        ]
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        gathered: list[Any] = [None] * self.layout.data
        torch.distributed.all_gather_object(gathered, mine, group=group)
        wrong, every = ({row for of_rank in gathered for row in of_rank[which]} for which in (0, 1))
        return tuple(sorted(wrong or every))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str | None:
    """The GPU's name; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def be_deterministic() -> None:
    """For this process: only kernels that give the same bits each time. Before anything runs on a GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # else every new tensor is filled, for debugging
    )


def start_rank(
    layout: Layout,
    rank: int,
    address: str,
    seed: int,
    timeout_minutes: float,
    listener: socket.socket | None = None,
) -> None:
    """Makes this process rank `rank`: the CPU layer where there is no GPU, then the process groups.

    Arguments as `topology.initialize` has them.
    """
    if not torch.cuda.is_available():
        megatron_on_cpu.activate()
        torch.set_num_threads(1)
    process_groups.initialize(layout, rank, address, seed, timeout_minutes, listener)
