"""The sums and the weights that data-parallel ranks send each other, beside the computation.

backward pass of a step's last micro-batch   a bucket's gradients are complete -> they are summed
optimizer step                               each rank has new weights of its own shard of a bucket
next forward pass                            a module runs -> the weights of its bucket are gathered

With --overlap-grad-reduce and --overlap-param-gather this happens while the ranks compute. Without
them it happens at the end of the backward pass and of the optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch

from miles.train.compute_config import ComputeConfig


def wrap(model: Any, compute: ComputeConfig) -> Any:
    """Return Megatron's `DistributedDataParallel` around a `GPTModel`.

    Args:
        compute: with everything resolved that depends on the ranks.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=bool(compute.overlap_grad_reduce),
            overlap_param_gather=bool(compute.overlap_param_gather),
            bucket_size=compute.ddp_bucket_size,
        ),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if compute.overlap_grad_reduce:
        # Gradients of a bucket are complete only after the last micro-batch.
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


def gather_weights(wrapped: Any) -> None:
    """Fetch the weights of the other ranks' shards, if the next forward pass was to do it.

    Collective. Call it before weights are read in any other way than by a forward pass.
    """
    if wrapped.ddp_config.overlap_param_gather:
        wrapped.start_param_sync(force_sync=True)


def await_weights(*modules: torch.nn.Module) -> None:
    """Call the hooks that would run if each module were called.

    With `--overlap-param-gather`, they wait for weights that other ranks updated. Call it before a
    forward pass uses the weights of modules without calling them.
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
