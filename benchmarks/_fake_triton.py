"""Triton kernels on a fake device: each is compiled for the GPU as it is called, and not launched.

registers, bytes of shared memory, bytes that do not fit into registers (spilled)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

COMPUTE_CAPABILITY = 90
"""H100, H200."""
_WARP = 32
_SHARED_BYTES = 232_448
"""The most that a block may take on such a GPU."""


@dataclass(frozen=True)
class CompiledKernel:
    """The resources that a kernel takes on the GPU."""

    name: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


class _Driver:
    """A driver that answers what Triton asks of a GPU's, short of launching anything."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": _SHARED_BYTES,
            "multiprocessor_count": 132,
            "warpSize": _WARP,
        }
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", COMPUTE_CAPABILITY, _WARP)


@contextmanager
def compiled_only(
    note: Callable[[str, list[Any]], None],
) -> Iterator[dict[int, CompiledKernel]]:
    """Compile Triton's kernels where they are called, and launch none.

    Args:
        note: gets each call: the kernel's name, and the tensors that it is given.

    Yields:
        the kernels that were compiled so far.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction, MockTensor

    compiled: dict[int, CompiledKernel] = {}
    plain_run = JITFunction.run

    def as_mock(value: Any) -> Any:
        return (
            MockTensor(value.dtype, list(value.shape))
            if hasattr(value, "untyped_storage")
            else value
        )

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tensors = [v for v in (*args, *kwargs.values()) if hasattr(v, "untyped_storage")]
        on_host = [tuple(tensor.shape) for tensor in tensors if not tensor.is_cuda]
        if on_host:
            raise ValueError(f"{self.__name__} gets tensors that are not on the GPU: {on_host}")

        mocks = {name: as_mock(value) for name, value in kwargs.items()}
        kernel = plain_run(self, *map(as_mock, args), grid=grid, warmup=True, **mocks)
        if id(kernel) not in compiled:
            compiled[id(kernel)] = _resources(self.__name__, kernel)
        note(self.__name__, tensors)
        return kernel

    driver.set_active(_Driver())
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = plain_run


def _resources(name: str, kernel: Any) -> CompiledKernel:
    """Return what a compiled kernel takes, as `cuobjdump` of Triton's wheel tells."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        line = [program, "--dump-resource-usage", file.name]
        usage = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return CompiledKernel(name, numbers["REG"], kernel.metadata.shared, spilled)
