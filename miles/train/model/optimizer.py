"""Megatron's distributed Adam, and its learning-rate schedule counted in optimizer steps."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from miles.errors import ConfigError
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.model import device, gradient_norm
from miles.train.model.dtypes import DTYPES
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.precision import Precision

_STATE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_FIRST_LOSS_SCALE = 2.0**8
"""The scale of the loss in float16, to begin with. The loss here is a sum over the tokens of a
micro-batch: a mean over some 4,000 tokens would settle between 2**15 and 2**20. Megatron's default,
2**32, would cost a run some twenty skipped steps at its beginning."""
_SMALLEST_LOSS_SCALE = 2.0**-14
"""Below 1, Megatron's own limit, which is for a mean."""


def build_optimizer(
    model: Any,
    settings: OptimizerSettings,
    num_steps: int,
    *,
    precision: Precision,
    compute: ComputeConfig = AS_USUAL,
) -> tuple[Any, Any]:
    """Return the optimizer of a DDP-wrapped model, and its learning-rate scheduler.

    Call `scheduler.step(1)` after each step of the run, `num_steps` times in all.

    Raises:
        ConfigError: it needs a package that is not installed here.
    """
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    require_installed(settings)
    gradient_norm.install()
    optimizer = get_megatron_optimizer(_optimizer_config(settings, precision), [model])
    if compute.adam_fusion:
        _fuse_adam(optimizer)
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


def _optimizer_config(settings: OptimizerSettings, precision: Precision) -> Any:
    """Return Megatron's `OptimizerConfig`."""
    from megatron.core.optimizer import OptimizerConfig

    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=precision is Precision.BF16,
        fp16=precision is Precision.FP16,
        params_dtype=DTYPES[precision],
        initial_loss_scale=_FIRST_LOSS_SCALE,
        min_loss_scale=_SMALLEST_LOSS_SCALE,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=settings.precision_aware and not settings.cpu_offload,
        main_params_dtype=_STATE_DTYPES[settings.main_params_dtype],
        exp_avg_dtype=_STATE_DTYPES[settings.exp_avg_dtype],
        exp_avg_sq_dtype=_STATE_DTYPES[settings.exp_avg_sq_dtype],
        optimizer_cpu_offload=settings.cpu_offload,
        optimizer_offload_fraction=settings.offload_fraction if settings.cpu_offload else 0.0,
        overlap_cpu_optimizer_d2h_h2d=settings.overlap_offload,
    )
    if settings.cpu_offload:
        # Without Transformer Engine, which the offloaded part does not need, megatron-core 0.16.1
        # fails where it reads this flag: it compares no version with 2.1.0 (TypeError).
        config.use_precision_aware_optimizer = True
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        config.store_param_remainders = False
    return config


def _fuse_adam(optimizer: Any) -> None:
    """Let torch's Adam take its step in one pass over the memory, where it is torch's.

    Megatron has no setting for it. The offloading optimizer asks for it itself. The defaults are
    changed too: they replace what a checkpoint has in its parameter groups (`restore_own_keys`).

    Args:
        optimizer: Megatron's `ChainedOptimizer`, before its first step.
    """
    for part in optimizer.chained_optimizers:
        if type(part.optimizer) is torch.optim.AdamW:
            for settings in (part.optimizer.defaults, *part.optimizer.param_groups):
                settings["fused"] = True


def is_loss_scaled(optimizer: Any) -> bool:
    """Return whether the loss is scaled, which it is in float16."""
    return optimizer.chained_optimizers[0].grad_scaler is not None


def can_loss_scale_fall(optimizer: Any) -> bool:
    """Return whether the loss is scaled by more than the smallest scale. This waits for the GPU."""
    scaler = optimizer.chained_optimizers[0].grad_scaler
    return bool(scaler.scale > scaler.min_scale)


def clip_gradient(optimizer: Any, grad_norm: float) -> None:
    """Scale the gradient down to `--clip-grad`, as `ChainedOptimizer.step` does.

    Args:
        grad_norm: of the whole gradient, over all ranks.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )


def require_installed(settings: OptimizerSettings) -> None:
    """Refuse settings of the optimizer that need a package which is not installed here.

    Raises:
        ConfigError: names the flag, the reason and what to do.
    """
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    if settings.precision_aware and not settings.cpu_offload:
        raise ConfigError(
            "--use-precision-aware-optimizer needs the FusedAdam of Transformer Engine, which is "
            "not installed here; leave it out, or give --optimizer-cpu-offload beside it"
        )
    if settings.cpu_offload and settings.offload_fraction < 1 and device.has_gpu():
        raise ConfigError(
            f"--optimizer-offload-fraction {settings.offload_fraction:g} needs Transformer Engine, "
            "which is not installed here: megatron-core 0.16.1 would move the moments of the GPU's "
            "share to the CPU when it resumes; give 1, or leave it out"
        )
