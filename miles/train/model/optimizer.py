"""Megatron's distributed Adam, and its learning-rate schedule counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from miles.errors import ConfigError


@dataclass(frozen=True)
class OptimizerSettings:
    """Names and meanings as in Megatron's flags."""

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"
    """constant, linear, cosine or inverse-square-root"""
    lr_warmup_iters: int = 0
    """steps over which the rate rises from 0 to `lr`"""
    lr_warmup_fraction: float | None = None
    """`--lr-warmup-fraction`: the same as a share of the run's steps; in place of `lr_warmup_iters`"""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """global norm above which gradients are scaled down; 0: never"""

    def __post_init__(self) -> None:
        styles = ("constant", "linear", "cosine", "inverse-square-root")
        if self.lr_decay_style not in styles:
            raise ConfigError(f"--lr-decay-style must be one of {', '.join(styles)}, not {self.lr_decay_style!r}")
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        if self.lr_warmup_iters < 0:
            raise ConfigError("--lr-warmup-iters must not be negative")
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_iters:
                raise ConfigError("--lr-warmup-iters and --lr-warmup-fraction say the same; give one of them")
            if not 0 <= self.lr_warmup_fraction < 1:
                raise ConfigError(f"--lr-warmup-fraction must be in [0, 1), not {self.lr_warmup_fraction}")

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up in a run of so many."""
        if self.lr_warmup_fraction is not None:
            return int(self.lr_warmup_fraction * num_steps)
        return self.lr_warmup_iters


def check_schedule(settings: OptimizerSettings, num_steps: int) -> None:
    """Raises:
    ConfigError: the warm-up is not shorter than the run.
    """
    if settings.warmup_steps(num_steps) >= num_steps:
        raise ConfigError(
            f"--lr-warmup-iters {settings.lr_warmup_iters} is not shorter than the run, which has {num_steps} steps"
        )


def build_optimizer(model: Any, settings: OptimizerSettings, num_steps: int, *, bf16: bool) -> tuple[Any, Any]:
    """The optimizer of a DDP-wrapped model, and its scheduler (`scheduler.step(1)` after each step)."""
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
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
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
