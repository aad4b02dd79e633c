"""Megatron's distributed Adam, and its learning-rate schedule counted in optimizer steps."""

from __future__ import annotations

from typing import Any

from miles.train.model.dtypes import DTYPES
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.precision import Precision


def build_optimizer(
    model: Any, settings: OptimizerSettings, num_steps: int, *, precision: Precision
) -> tuple[Any, Any]:
    """Return the optimizer of a DDP-wrapped model, and its learning-rate scheduler.

    Call `scheduler.step(1)` after each step of the run, `num_steps` times in all.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=precision is Precision.BF16,
            params_dtype=DTYPES[precision],
            use_distributed_optimizer=True,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps(num_steps),
        lr_decay_steps=num_steps,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
