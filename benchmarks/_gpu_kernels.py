"""The time of a step, by where it goes: kernels of torch's profiler by kind, and the chip's ceilings."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from miles.train.model import device

KINDS = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_scatter"),
    ("attention", r"flash|fmha|attention|varlen|sdpa"),
    ("optimizer", r"adam|multi_tensor|l2norm|lpnorm|foreach"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|wgmma|matmul|splitk|::(add|b)?mm\b"),
    ("loss", r"softmax|cross_entropy|nll|logsumexp|_sum_row|_write_gradient"),
    ("heads: norms, rotation", r"rope|rotary|split_heads|join_gradients"),
    ("norms", r"norm"),
    ("SwiGLU", r"swiglu|silu"),
    ("copies", r"memcpy|memset|copy|\bcat|cat_?array|index|gather|scatter|embedding|fill|sort"),
    ("sums", r"reduce|sum"),
    ("other elementwise", r""),
)
"""Kind and a pattern of its kernels' names. The first that fits counts."""

_PATTERNS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KINDS]
MOST_KERNELS = 25
MAX_NAME = 160
_NOISE = re.compile(
    r"^void |at::native::|at::cuda::|\(anonymous namespace\)::|std::|pytorch_flash::"
)


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, in nanoseconds."""

    name: str
    start: int
    duration: int


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    return next(kind for kind, pattern in _PATTERNS if pattern.search(name))


def short_name(name: str) -> str:
    """Return the telling part of a kernel's name: C++ puts much around it."""
    return _NOISE.sub("", name)[:MAX_NAME]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if device.has_gpu():
        torch.cuda.synchronize()


def profile(run: Callable[[], Any]) -> dict[str, Any]:
    """Profile a step.

    Returns:
        its wall time, the time of each kind of kernel, the time in which none ran, and the kernels
        that took the longest, in milliseconds.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_gpu = device.has_gpu()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    synchronize()
    with torch_profile(activities=[activity], acc_events=False) as profiler:
        started = time.perf_counter()
        run()
        synchronize()
        wall = time.perf_counter() - started
    kernels = _kernels(profiler, on_gpu)

    by_kind: Counter[str] = Counter()
    by_name: defaultdict[str, list[int]] = defaultdict(list)
    for kernel in kernels:
        by_kind[kind_of(kernel.name)] += kernel.duration
        by_name[kernel.name].append(kernel.duration)
    busy = _union(kernels)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]
    return {
        "wall_ms": wall * 1e3,
        "busy_ms": busy / 1e6,
        "idle_ms": wall * 1e3 - busy / 1e6,
        "num_kernels": len(kernels),
        "by_kind_ms": {kind: by_kind[kind] / 1e6 for kind, _ in KINDS if by_kind[kind]},
        "longest": [
            {
                "kernel": short_name(name),
                "calls": len(runs),
                "ms": sum(runs) / 1e6,
                "kind": kind_of(name),
            }
            for name, runs in longest
        ],
    }


def _kernels(profiler: Any, on_gpu: bool) -> list[Kernel]:
    """Return the kernels of a GPU; without one, the operations, each less those inside it."""
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    kernels = [
        Kernel(event.name(), event.start_ns(), event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == wanted and not _is_annotation(event)
    ]
    kernels.sort(key=lambda kernel: (kernel.start, -kernel.duration))
    return kernels if on_gpu else _without_inner(kernels)


def _is_annotation(event: Any) -> bool:
    """Return whether an event only names a stretch of time in which others ran."""
    activity = getattr(event, "activity_type", None)
    return activity is not None and "annotation" in str(activity())


def _without_inner(operations: list[Kernel]) -> list[Kernel]:
    """Return nested operations with the time that they spend outside of others. They are sorted."""
    own = [operation.duration for operation in operations]
    around: list[int] = []
    for index, operation in enumerate(operations):
        while around and operation.start >= _end(operations[around[-1]]):
            around.pop()
        if around:
            own[around[-1]] -= operation.duration
        around.append(index)
    return [replace(operation, duration=ns) for operation, ns in zip(operations, own, strict=True)]


def _end(kernel: Kernel) -> int:
    return kernel.start + kernel.duration


def _union(kernels: list[Kernel]) -> int:
    """Return the time in which at least one kernel ran. They are sorted by their start."""
    busy = end = 0
    for kernel in kernels:
        busy += max(0, _end(kernel) - max(end, kernel.start))
        end = max(end, _end(kernel))
    return busy


def ceilings(*, is_tiny: bool) -> dict[str, float]:
    """Measure a large matrix product in bfloat16 and a large copy.

    Returns:
        FLOP/s of 8192 x 8192 x 8192 on random numbers, bytes/s of a 4 GiB copy (bytes read and
        bytes written), each the median of 10.
    """
    where = device.torch_device()
    size = 128 if is_tiny else 8192
    left, right = (torch.randn(size, size, device=where).bfloat16() for _ in range(2))
    product = median_seconds(lambda: left @ right, repeats=10)

    num_bytes = 1 << 20 if is_tiny else 4 << 30
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), repeats=10)
    return {
        "matrix_product_flops": 2 * size**3 / product,
        "copy_bytes_per_second": 2 * num_bytes / copy,
    }


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call, by events where there is a GPU."""
    for _ in range(3):
        run()
    synchronize()

    seconds = []
    for _ in range(repeats):
        if device.has_gpu():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]
