"""Let Megatron, which asks for CUDA by name, run on a CPU. This is the only place that does so.

Megatron-core 0.16.1 creates tensors on `device="cuda"`, asks `torch.cuda` for streams and random
states, and compares `Tensor.type()` with "torch.cuda.FloatTensor". Where there is no CUDA,
`activate` answers all of that with the CPU. Where there is CUDA, it refuses.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_active: _CudaMeansCpu | None = None


class _CudaMeansCpu(TorchFunctionMode):
    """A mode that sees every torch call of this thread and turns "cuda" in it into "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer compares this name.
            return str(func(*args)).replace("torch.", "torch.cuda.")

        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # there is no GPU to copy from it
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """A stream or event of a device on which everything runs in order anyway."""

    def __init__(self, device: Any = None, priority: int = 0, enable_timing: bool = False) -> None:
        pass

    def wait(self, stream: Any = None) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> _Stream:
        return self

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def activate() -> None:
    """Make Megatron's "cuda" the CPU, for this process and thread. A second call does nothing.

    Raises:
        RuntimeError: CUDA is available; with this layer everything would silently run on the CPU.
    """
    global _active
    if torch.cuda.is_available():
        raise RuntimeError(
            "miles.train.model.megatron_on_cpu must not be activated where CUDA is available"
        )
    if _active is not None:
        return

    # Megatron decorates small functions with torch.compile. On a CPU each takes seconds to compile.
    torch._dynamo.config.disable = True
    _replace_torch_cuda()
    _replace_random_states()
    _replace_all_to_all()
    _replace_uneven_parts()
    _replace_offloading()
    _active = _CudaMeansCpu()
    _active.__enter__()


def _replace_torch_cuda() -> None:
    """Answer Megatron's calls of `torch.cuda` with the CPU."""
    stream = _Stream()
    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "initial_seed": torch.initial_seed,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }

    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.record_stream = lambda self, stream: None


def _replace_random_states() -> None:
    """Use the CPU's generator for Megatron's random states.

    0.16.1 calls the C++ side of torch.cuda for them, which a CPU build does not have.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )


def _replace_all_to_all() -> None:
    """Accept tensors as split sizes.

    0.16.1 turns the token counts of experts into lists only when it copies them from a GPU.
    """
    exchange = torch.distributed.all_to_all_single

    def all_to_all_single(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
    ) -> Any:
        return exchange(
            output, input, _as_list(output_split_sizes), _as_list(input_split_sizes), group=group
        )

    torch.distributed.all_to_all_single = all_to_all_single


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def _replace_uneven_parts() -> None:
    """Gather and scatter parts of unequal length, as NCCL does.

    An expert's tensor-parallel ranks exchange as many tokens as each received. gloo (torch 2.13)
    takes equal parts only.
    """
    gather = torch.distributed.all_gather
    scatter = torch.distributed.reduce_scatter

    def all_gather(parts: Any, own: Any, group: Any = None) -> Any:
        lengths = [len(part) for part in parts]
        if len(set(lengths)) == 1:
            return gather(parts, own, group=group)

        padded = own.new_zeros(max(lengths), *own.shape[1:])
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in parts]
        gather(received, padded, group=group)
        for part, from_rank in zip(parts, received, strict=True):
            part.copy_(from_rank[: len(part)])

    def reduce_scatter(output: Any, parts: Any, group: Any = None) -> Any:
        if len({len(part) for part in parts}) == 1:
            return scatter(output, parts, group=group)

        rows = torch.cat(list(parts))
        torch.distributed.all_reduce(rows, group=group)
        sums = rows.split([len(part) for part in parts])
        output.copy_(sums[torch.distributed.get_rank(group)])

    torch.distributed.all_gather = all_gather
    torch.distributed.reduce_scatter = reduce_scatter


class _HostCopies(TorchFunctionMode):
    """A mode in which tensors are on a GPU, but for those of `cpu()` and copies of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_host = any(getattr(value, "is_host_copy", False) for value in args)
        if func == torch.Tensor.is_cuda.__get__:
            return not is_host

        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and (is_host or func is torch.Tensor.cpu):
            result.is_host_copy = True  # type: ignore[attr-defined]
        return result


def _replace_offloading() -> None:
    """Let the optimizer that offloads its state copy from this CPU to this CPU.

    0.16.1 asks each parameter whether it is on a GPU, and has no copy of one that is not.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def divide_between_devices(self: Any, offload_fraction: float) -> Any:
        with _HostCopies():
            return divide(self, offload_fraction)

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divide_between_devices
