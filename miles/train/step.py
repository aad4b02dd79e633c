"""One rank's trainer: model, optimizer, and the step over a rank's micro-batches. No Ray in here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.architecture import ModelShape
from miles.data.types import MicroBatch, StepReport
from miles.train import cpu, topology
from miles.train.loss import SourceSums, masked_sum
from miles.train.model import build_model, forward_packed
from miles.train.optimizer import OptimizerSettings, build_optimizer
from miles.train.topology import Layout


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
    ) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self.shape, self.layout, self.rank = shape, layout, rank
        self.num_sources = num_sources
        model = build_model(shape, layout, bf16=bf16)
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

        A step in which nothing trains, or whose loss is not finite, takes no optimizer step (and decays no
        weight); the schedule moves on, so that step k has the same rate in every run.
        """
        from megatron.core import parallel_state

        started = time.perf_counter()
        lr = float(self.optimizer.param_groups[0]["lr"])
        if report.num_trained_tokens == 0:
            self.scheduler.step(1)
            zeros = (0,) * self.num_sources
            return StepResult(zeros, zeros, 0.0, lr, "nothing to train", time.perf_counter() - started)

        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = SourceSums(self._run(micro_batches, forward_only=False))
        if self.layout.is_last_stage(self.rank):
            sums.all_reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.layout.pipeline > 1:  # all stages must agree on whether to step
            torch.distributed.broadcast(
                sums.vector,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        skipped, grad_norm = "", float("nan")
        if not torch.isfinite(sums.vector).all():
            skipped = "loss is not finite"
        else:
            _, norm, _ = self.optimizer.step()
            grad_norm = float(norm) if norm is not None else 0.0
        self.scheduler.step(1)
        assert sum(sums.tokens) == report.num_trained_tokens, "the ranks trained other tokens than the step holds"
        return StepResult(tuple(sums.losses), tuple(sums.tokens), grad_norm, lr, skipped, time.perf_counter() - started)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> SourceSums:
        """Loss sums and token counts of this rank's micro-batches, by source, without a backward pass."""
        self.model.eval()
        with torch.no_grad():
            return SourceSums(self._run(micro_batches, forward_only=True))

    def logits(self, input_ids: Sequence[int]) -> np.ndarray:
        """Logits of one sequence, float32 [tokens, vocabulary]; without tensor or pipeline parallelism only."""
        assert self.layout.tensor == self.layout.pipeline == 1
        ids = np.asarray(input_ids, np.int64)
        one = MicroBatch(
            input_ids=ids,
            labels=np.zeros_like(ids),
            position_ids=np.arange(len(ids), dtype=np.int64),
            loss_mask=np.zeros(len(ids), np.float32),
            cu_seqlens=np.array([0, len(ids)], np.int32),
            source_ids=np.zeros(1, np.int32),
            row_ids=np.zeros(1, np.int64),
        )
        self.model.eval()
        with torch.no_grad():
            out: np.ndarray = forward_packed(self.gpt, one, labels=False)[0].float().cpu().numpy()
        return out

    def _run(self, micro_batches: Sequence[MicroBatch], *, forward_only: bool) -> Tensor:
        """float64 [2 x sources], summed over the micro-batches; zeros on all but the last pipeline stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        outputs = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(micro_batches),
            model=[self.model],
            num_microbatches=len(micro_batches),
            seq_length=max(len(batch.input_ids) for batch in micro_batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        total = torch.zeros(2 * self.num_sources, dtype=torch.float64, device=_device())
        for output in outputs:
            total += output["by_source"]
        return total

    def _forward_step(self, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        return forward_packed(model, batch, labels=True), partial(self._loss, batch)

    def _loss(self, batch: MicroBatch, token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, num_tokens, by_source = masked_sum(token_losses, batch, self.num_sources)
        return total, num_tokens, {"by_source": by_source}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_rank(layout: Layout, rank: int, init_method: str, seed: int, timeout_minutes: float) -> None:
    """Makes this process rank `rank`: the CPU layer where there is no GPU, then the process groups."""
    if not torch.cuda.is_available():
        cpu.activate()
        torch.set_num_threads(1)
    topology.initialize(layout, rank, init_method, seed, timeout_minutes)
