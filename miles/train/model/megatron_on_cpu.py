"""Lets Megatron, which asks for CUDA by name, run on a CPU. The one place where that is arranged.

Megatron-core 0.16.1 creates tensors on `device="cuda"`, asks `torch.cuda` for streams and random states,
and compares `Tensor.type()` with "torch.cuda.FloatTensor". Where there is no CUDA, `activate` answers
those questions with the CPU. It refuses to do so where there is.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_active: _CudaMeansCpu | None = None


class _CudaMeansCpu(TorchFunctionMode):
    """Sees every torch call of this thread, and turns the word "cuda" in it into "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(func(*args)).replace(
                "torch.", "torch.cuda."
            )  # the distributed optimizer compares it
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """A stream or event of a device that runs everything in order anyway."""

    def __init__(self, device: Any = None, priority: int = 0, enable_timing: bool = False) -> None:
        pass

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> _Stream:
        return self

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def activate() -> None:
    """From here on, in this process and thread, Megatron's "cuda" is the CPU. Calling it again does nothing.

    Raises:
        RuntimeError: CUDA is available, where this layer would only slow things down in silence.
    """
    global _active
    if torch.cuda.is_available():
        raise RuntimeError(
            "miles.train.model.megatron_on_cpu must not be activated where CUDA is available"
        )
    if _active is not None:
        return
    # Megatron decorates small functions with torch.compile: on a CPU each costs seconds of compiling.
    torch._dynamo.config.disable = True

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

    from megatron.core.tensor_parallel import random as megatron_random

    # 0.16.1 calls the C++ side of torch.cuda for these two, which a CPU build does not have.
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )

    # 0.16.1 turns the token counts of experts into lists on their way from the GPU alone.
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

    _active = _CudaMeansCpu()
    _active.__enter__()


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def is_active() -> bool:
    return _active is not None
