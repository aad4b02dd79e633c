"""One rank's trainer: model, optimizer, and the step over a rank's micro-batches. No Ray in here.

A training step, on every rank at once:

    micro-batches -> forward and backward -> sums of loss and tokens -> over all ranks -> gradient's
    norm -> clip -> optimizer step, or a skip that names the rows
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.architecture.adapter import AdapterShape
from miles.architecture.config import ModelShape
from miles.common import checkpoint_folder
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.data.types import DUMMY_ROW_ID, MicroBatch, StepReport
from miles.train.model import data_parallel, device
from miles.train.model.build import build_model
from miles.train.model.device_batch import DeviceBatch, send, send_ahead
from miles.train.model.loss import (
    MicroBatchSums,
    SourceSums,
    masked_sum,
    rows_not_finite,
    sum_by_source,
)
from miles.train.model.optimizer import (
    build_optimizer,
    can_loss_scale_fall,
    clip_gradient,
    is_loss_scaled,
)
from miles.train.model.output_loss import TokenLosses
from miles.train.model.packed_forward import forward_packed, pad_for_tensor_ranks, single_sequence
from miles.train.model.router_loads import RouterLoads
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.rank.finite_weights import names_not_finite
from miles.train.rank.generate import greedy
from miles.train.types import Skip, SkipReason, StepResult, TrainerSettings


@dataclass(frozen=True)
class _StepEnd:
    """The end of a step."""

    sums: SourceSums
    """on the host"""
    grad_norm: float
    """before clipping"""
    reason: SkipReason | None
    """why the optimizer took no step; None: it did"""


class Trainer:
    """Model, optimizer and learning-rate schedule of one rank.

    The process must be a rank already (`rank_process.start_rank`).

    Args:
        settings: equal on all ranks.
        rank: number of this rank.

    Raises:
        ConfigError: the model cannot be divided among the ranks of the layout.
    """

    def __init__(self, settings: TrainerSettings, rank: int) -> None:
        self.settings = settings
        self.rank = rank

        model = build_model(
            settings.shape,
            settings.layout,
            precision=settings.precision,
            recompute=settings.recompute,
            compute=settings.compute,
            lora=settings.lora,
        )
        compute = settings.compute.resolved(
            has_gpus=device.has_gpu(), data_parallel=settings.layout.data
        )
        self.model = data_parallel.wrap(model, compute)

        self.optimizer, self.scheduler = build_optimizer(
            self.model,
            settings.optimizer,
            settings.num_steps,
            precision=settings.precision,
            compute=settings.compute,
        )
        if settings.precision is Precision.FP16:
            # The loss is multiplied by the scale before the backward pass; `prepare_grads` divides.
            self.model.config.grad_scale_func = self.optimizer.scale_loss

        self.router_loads: RouterLoads | None = None
        if settings.shape.num_experts is not None:
            self.router_loads = RouterLoads(
                self.gpt, settings.shape, settings.layout, settings.optimizer.moe_aux_loss_coeff
            )

    @property
    def shape(self) -> ModelShape:
        return self.settings.shape

    @property
    def layout(self) -> Layout:
        return self.settings.layout

    @property
    def adapter(self) -> AdapterShape | None:
        """Return the shape of the adapter that is trained; None: all weights are."""
        lora = self.settings.lora
        return None if lora is None else lora.adapter

    @property
    def gpt(self) -> Any:
        """Return the `GPTModel` inside the wrappers. `gather_weights` comes before reading it."""
        return self.model.module

    def gather_weights(self) -> None:
        """Make this rank's copy of every weight that of the last step. Collective.

        Call it before weights are read in any other way than by a forward pass: with
        --overlap-param-gather, they are on their way.
        """
        data_parallel.gather_weights(self.model)

    def copy_weights_to_optimizer(self) -> None:
        """Take over the model's weights into the optimizer, which keeps a copy of its own.

        Call it after the weights were replaced.
        """
        self.optimizer.reload_model_params()

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint's `miles.json` holds of the trainer: how to balance experts."""
        if self.router_loads is None or self.router_loads.last_choices is None:
            return {}
        return {checkpoint_folder.EXPERT_CHOICES: list(self.router_loads.last_choices)}

    def restore_extra_state(self, checkpoint: SavedCheckpoint) -> None:
        """Continue from the `extra_state` of a checkpoint. Older ones have none."""
        choices = (checkpoint.extra or {}).get(checkpoint_folder.EXPERT_CHOICES)
        if self.router_loads is not None and choices is not None:
            self.router_loads.continue_from(choices)

    def train_step(self, report: StepReport, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Train on this rank's micro-batches of one step. Collective.

        A step in which nothing is trained, or whose loss or gradient is not finite, takes no
        optimizer step and decays no weight. The learning-rate schedule moves on all the same, so
        that step k has the same rate in every run.
        """
        started = time.perf_counter()
        lr = float(self.optimizer.param_groups[0]["lr"])

        if report.content.num_trained_tokens == 0:
            self.scheduler.step(1)
            zeros = (0,) * self.settings.num_sources
            seconds = time.perf_counter() - started
            return StepResult(zeros, zeros, 0.0, lr, seconds, Skip(SkipReason.NOTHING_TO_TRAIN))

        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.model.config.finalize_model_grads_func = partial(
            _finalize_gradients, num_trained_tokens=report.content.num_trained_tokens
        )
        batches = self._padded(micro_batches)
        step = report.position.index
        if self.router_loads is not None:
            if self.router_loads.must_count_ahead:
                self._count_ahead(self.router_loads, batches, step)
            self.router_loads.begin_step(report.content)
        outputs = self._run_micro_batches(
            batches,
            self.settings.num_sources,
            step=step,
            forward_only=False,
            loads=self.router_loads,
        )

        sums = self._reduce(outputs, self.settings.num_sources, self.router_loads)
        end = self._step_optimizer(sums)
        self.scheduler.step(1)
        assert sum(end.sums.tokens) == report.content.num_trained_tokens, (
            "the ranks trained other tokens than the step holds"
        )

        router = None
        if self.router_loads is not None:
            router = self.router_loads.finish_step(
                sums.others, end.sums.others, is_taken=end.reason is None
            )

        skip = None
        if end.reason is SkipReason.LOSS_SCALE_TOO_HIGH:
            skip = Skip(end.reason)
        elif end.reason is not None:
            skip = self._skip(end.reason, outputs, batches)
        seconds = time.perf_counter() - started
        losses, tokens = tuple(end.sums.losses), tuple(end.sums.tokens)
        return StepResult(losses, tokens, end.grad_norm, lr, seconds, skip, router)

    def evaluate(self, steps: Iterable[Sequence[MicroBatch]], num_sources: int) -> SourceSums:
        """Return loss sums and token counts by source, over all data ranks. Collective.

        Args:
            steps: this rank's micro-batches of each step; every rank has equally many.
            num_sources: sources of the evaluation set.
        """
        self.model.eval()
        total = SourceSums.zeros(num_sources)

        with torch.no_grad():
            for micro_batches in steps:
                batches = self._padded(micro_batches)
                outputs = self._run_micro_batches(batches, num_sources, forward_only=True)
                total.vector.add_(self._reduce(outputs, num_sources).vector)

        return total.on_host()

    def generate(
        self, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_tokens: int
    ) -> list[list[int]]:
        """Return the most likely continuations, as `generate.greedy` does. Collective."""
        self.model.eval()
        return greedy(self.model, self.layout, self.rank, prompts, stop_ids, max_tokens)

    def logits(self, input_ids: Sequence[int]) -> np.ndarray:
        """Return the logits of one sequence, float32 [tokens, vocabulary].

        Only without tensor and pipeline parallelism.
        """
        assert self.layout.tensor == self.layout.pipeline == 1
        self.model.eval()
        with torch.no_grad():
            out = forward_packed(self.gpt, send(single_sequence(input_ids)), with_labels=False)
        logits: np.ndarray = out[0].float().cpu().numpy()
        return logits

    def _padded(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        return [pad_for_tensor_ranks(batch, self.layout) for batch in micro_batches]

    def _run_micro_batches(
        self,
        batches: Sequence[MicroBatch],
        num_sources: int,
        *,
        step: int = 0,
        forward_only: bool,
        loads: RouterLoads | None = None,
    ) -> list[MicroBatchSums]:
        """Run forward and, unless `forward_only`, backward over the micro-batches.

        Args:
            loads: of the experts, which count the forward pass; None: nothing does.

        Returns:
            the sums of each micro-batch. Empty on every pipeline stage but the last.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        outputs: list[MicroBatchSums] = get_forward_backward_func()(
            forward_step_func=partial(
                _forward_step, num_sources=num_sources, step=step, loads=loads
            ),
            data_iterator=send_ahead(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=max(len(batch.input_ids) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return outputs

    def _count_ahead(self, loads: RouterLoads, batches: Sequence[MicroBatch], step: int) -> None:
        """Count what a step is about to choose, in a forward pass of its own."""
        num_sources = self.settings.num_sources
        loads.forget_step()
        with torch.no_grad():
            outputs = self._run_micro_batches(
                batches, num_sources, step=step, forward_only=True, loads=loads
            )
        loads.balance(self._reduce(outputs, num_sources, loads).others)

    def _reduce(
        self,
        outputs: Sequence[MicroBatchSums],
        num_sources: int,
        loads: RouterLoads | None = None,
    ) -> SourceSums:
        """Add the sums by source over all data ranks. Returns the same on every rank.

        Args:
            loads: of the experts, to be added up beside them over all ranks.
        """
        from megatron.core import parallel_state

        sums = SourceSums.zeros(num_sources)
        for output in outputs:
            sums.vector.add_(output.by_source)
        data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if loads is not None:
            # Tensor ranks have the same sums by source, but each has routed tokens of its own.
            if parallel_state.get_tensor_model_parallel_rank() > 0:
                sums.vector.zero_()
            sums = sums.beside(loads.sums)
            sums.all_reduce(data_group)
            if self.layout.tensor * self.layout.pipeline > 1:
                sums.all_reduce(parallel_state.get_model_parallel_group())
            return sums

        if self.layout.is_last_stage(self.rank):
            sums.all_reduce(data_group)

        # All pipeline stages must agree on whether to step.
        if self.layout.pipeline > 1:
            torch.distributed.broadcast(
                sums.vector,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return sums

    def _step_optimizer(self, sums: SourceSums) -> _StepEnd:
        """Clip the gradient and take an optimizer step, unless something is not finite.

        The host waits for the GPU once, for the gradient's norm, with everything launched that
        comes before it. It does not wait for the optimizer: the next step begins meanwhile.

        Args:
            sums: of the step, on the device.
        """
        is_scaled = is_loss_scaled(self.optimizer)
        # A gradient that overflows lowers the scale. One of a loss that is not finite must not.
        if is_scaled and not torch.isfinite(sums.vector).all():
            return _StepEnd(sums.on_host(), float("nan"), SkipReason.LOSS_NOT_FINITE)

        can_scale_fall = is_scaled and can_loss_scale_fall(self.optimizer)
        overflows = self.optimizer.prepare_grads()
        if overflows and can_scale_fall:
            return _StepEnd(sums.on_host(), float("inf"), SkipReason.LOSS_SCALE_TOO_HIGH)

        # The norm is taken over all ranks, so that they agree on what follows.
        grad_norm = float(self.optimizer.get_grad_norm())
        sums = sums.on_host()
        if not torch.isfinite(sums.vector).all():
            return _StepEnd(sums, float("nan"), SkipReason.LOSS_NOT_FINITE)
        if not math.isfinite(grad_norm):
            return _StepEnd(sums, grad_norm, SkipReason.GRADIENT_NOT_FINITE)

        # Not `step`, which would prepare the gradients again, and divide by the loss scale twice.
        clip_gradient(self.optimizer, grad_norm)
        self.optimizer.step_with_ready_grads()
        return _StepEnd(sums, grad_norm, None)

    def _skip(
        self,
        reason: SkipReason,
        outputs: Sequence[MicroBatchSums],
        batches: Sequence[MicroBatch],
    ) -> Skip:
        """Return why a step was skipped, and what made it so: weights of any rank, or rows."""
        self.gather_weights()
        weights: list[Any] = [None] * self.layout.world_size
        torch.distributed.all_gather_object(
            weights, names_not_finite(self.gpt, self.shape, self.adapter)
        )
        broken = tuple(dict.fromkeys(chain.from_iterable(weights)))
        if broken:
            return Skip(reason, weights=broken)
        return Skip(reason, self._unusable_rows(outputs, batches))

    def _unusable_rows(
        self, outputs: Sequence[MicroBatchSums], batches: Sequence[MicroBatch]
    ) -> tuple[int, ...]:
        """Return the ids of the rows that made a step unusable, gathered from all data ranks.

        Those whose loss is not finite; all rows of the step where every loss is finite. Empty on
        every pipeline stage but the last.
        """
        from megatron.core import parallel_state

        if not self.layout.is_last_stage(self.rank):
            return ()

        not_finite: set[int] = set()
        every_row: set[int] = set()
        for output, batch in zip(outputs, batches, strict=True):
            not_finite.update(rows_not_finite(output.by_segment, batch))
            every_row.update(batch.row_ids.tolist())
        every_row.discard(DUMMY_ROW_ID)

        gathered: list[Any] = [None] * self.layout.data
        torch.distributed.all_gather_object(
            gathered,
            (not_finite, every_row),
            group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        not_finite = set().union(*(of_rank for of_rank, _ in gathered))
        every_row = set().union(*(of_rank for _, of_rank in gathered))
        return tuple(sorted(not_finite or every_row))


def _forward_step(
    batches: Iterator[DeviceBatch],
    model: Any,
    *,
    num_sources: int,
    step: int,
    loads: RouterLoads | None,
) -> tuple[Any, Any]:
    """Run one micro-batch forward; the second result computes the loss from the first.

    Args:
        loads: of the experts, which count it; None: nothing does.
    """
    batch = next(batches)

    def loss(losses: TokenLosses) -> tuple[Tensor, Tensor, MicroBatchSums]:
        total, count, by_segment = masked_sum(losses, batch)
        by_source = sum_by_source(by_segment, batch, num_sources)
        return total, count, MicroBatchSums(by_segment, by_source)

    with contextlib.nullcontext() if loads is None else loads.counting():
        return forward_packed(model, batch, with_labels=True, step=step), loss


def _finalize_gradients(
    model: list[Any], num_tokens: Tensor | None, *, num_trained_tokens: int, **arguments: Any
) -> None:
    """Add up the gradients over the ranks, and divide them by the trained tokens of the step.

    Megatron's `finalize_model_grads` (0.16.1) does both, but it adds up the numbers of tokens on
    the GPU and waits for their sum. The step's report has it.

    Args:
        num_tokens: this rank's trained tokens, which nobody asks for.
        num_trained_tokens: those of all ranks.
    """
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model, None, **arguments)
    # In float32, as Megatron divides.
    scale = float(np.float32(1) / np.float32(num_trained_tokens))
    for part in model:
        part.scale_gradients(scale)
