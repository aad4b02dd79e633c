"""A CUDA device that computes nothing: tensors on it have a shape, a type and a device, no values.

    stubs        C libraries that answer every call of the CUDA runtime and driver with success
    FakeDevice   PyTorch's fake tensors, and answers to what they cannot tell

The stubs are made for the PyTorch that is installed, which must be a CUDA build.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so")
"""PyTorch's libraries that call CUDA."""
_RUNTIME_NAME = re.compile(rb"\x00(cuda[A-Z][A-Za-z0-9_]+)(?=\x00)")
_DRIVER_NAME = re.compile(rb"\x00(cu[A-Z][A-Za-z0-9]+(?:_v[0-9])?)(?=\x00)")
_NOT_NEEDED = re.compile("D3D|WGL|VDPAU|EGL|GL[A-Z]|Graph|_pt[ds]z?$|Texture|Surface")
_DRIVER_NAMES = {
    "cuInit",
    "cuGetErrorString",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDriverGetVersion",
    "cuDevicePrimaryCtxRetain",
}
"""Functions that are looked up under a name put together at run time."""

_RUNTIME_ANSWERS = {
    "cudaGetLastError": "int cudaGetLastError(void){return 0;}",
    "cudaPeekAtLastError": "int cudaPeekAtLastError(void){return 0;}",
    "cudaGetErrorString": 'const char*cudaGetErrorString(int e){return "stub";}',
    "cudaGetErrorName": 'const char*cudaGetErrorName(int e){return "stub";}',
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int*n){*n=1;return 0;}",
    "cudaGetDevice": "int cudaGetDevice(int*d){*d=0;return 0;}",
    "cudaStreamIsCapturing": "int cudaStreamIsCapturing(void*s,int*c){*c=0;return 0;}",
    "cudaDeviceGetStreamPriorityRange": (
        "int cudaDeviceGetStreamPriorityRange(int*a,int*b){*a=0;*b=-1;return 0;}"
    ),
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int*v){*v=13000;return 0;}",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int*v){*v=13000;return 0;}",
    "cudaMemGetInfo": "int cudaMemGetInfo(size_t*a,size_t*b){*a=*b=80ul<<30;return 0;}",
    "cudaMalloc": "int cudaMalloc(void**p,size_t n){*p=malloc(n);return 0;}",
    "cudaHostAlloc": "int cudaHostAlloc(void**p,size_t n,unsigned f){*p=malloc(n);return 0;}",
    "cudaStreamCreateWithPriority": (
        "int cudaStreamCreateWithPriority(void**s,unsigned f,int p){*s=(void*)16;return 0;}"
    ),
    "cudaEventCreateWithFlags": (
        "int cudaEventCreateWithFlags(void**e,unsigned f){*e=(void*)16;return 0;}"
    ),
    # The places of a few fields in CUDA 13's cudaDeviceProp: a name, 80 GiB, sm_90, 132 units.
    "cudaGetDeviceProperties": (
        "int cudaGetDeviceProperties(char*p,int d){memset(p,0,1008);"
        'strcpy(p,"NVIDIA H100 80GB HBM3");*(size_t*)(p+288)=80ul<<30;*(size_t*)(p+296)=49152;'
        "*(int*)(p+304)=65536;*(int*)(p+308)=32;*(int*)(p+320)=1024;*(int*)(p+360)=9;"
        "*(int*)(p+384)=132;return 0;}"
    ),
}
_DRIVER_ANSWERS = {
    "cuDevicePrimaryCtxGetState": (
        "int cuDevicePrimaryCtxGetState(int d,unsigned*f,int*a){if(f)*f=0;if(a)*a=0;return 0;}"
    )
}
_HEADERS = "#include <stddef.h>\n#include <stdlib.h>\n#include <string.h>\n"


def build_stubs(folder: Path) -> dict[str, str]:
    """Write the two libraries into a folder, and return the environment that puts them to use."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("PyTorch is not installed here")
    lib = Path(spec.origin).parent / "lib"
    if not (lib / _LIBRARIES[0]).exists():
        sys.exit("this PyTorch has no CUDA: install a CUDA build (docs/performance.md)")
    content = b"".join((lib / name).read_bytes() for name in _LIBRARIES)

    runtime = {name.decode() for name in _RUNTIME_NAME.findall(content)}
    runtime = {name for name in runtime if not _NOT_NEEDED.search(name)}
    driver = {name.decode() for name in _DRIVER_NAME.findall(content)} | _DRIVER_NAMES
    folder.mkdir(parents=True, exist_ok=True)
    _compile(folder / "libcudart_stub.so", runtime, _RUNTIME_ANSWERS)
    _compile(folder / "libcuda.so.1", driver, _DRIVER_ANSWERS)
    return {
        "LD_LIBRARY_PATH": os.fspath(folder),
        "LD_PRELOAD": os.fspath(folder / "libcudart_stub.so"),
        # Inductor wants to time its kernels on a device.
        "TORCHDYNAMO_DISABLE": "1",
    }


def _compile(path: Path, names: set[str], answers: dict[str, str]) -> None:
    """Compile a library in which each function returns 0, but those with an answer of their own."""
    lines = [answers.get(name, f"int {name}(void){{return 0;}}") for name in {*names, *answers}]
    source = path.with_suffix(".c")
    source.write_text(_HEADERS + "\n".join(sorted(lines)), encoding="utf-8")
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", path, source], check=True)


@contextlib.contextmanager
def fake_device(watch: Any) -> Iterator[None]:
    """Make every new tensor a fake one, and every process group one that exchanges nothing.

    Args:
        watch: a `Watch`, which sees every operation.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    from_numpy, tensor = torch.from_numpy, torch.tensor
    join, new_group = torch.distributed.init_process_group, torch.distributed.new_group

    def join_fake(backend: Any = None, **options: Any) -> None:
        join("fake", **{**options, "store": FakeStore()})

    def new_fake_group(ranks: Any = None, **options: Any) -> Any:
        return new_group(ranks, **{**options, "backend": "fake", "pg_options": None})

    def gather_objects(gathered: list[Any], own: Any, group: Any = None) -> None:
        gathered[:] = [own] * len(gathered)

    replacements: list[tuple[Any, str, Any]] = [
        (torch, "from_numpy", lambda array: mode.from_tensor(from_numpy(array))),
        (torch, "tensor", lambda data, **options: tensor(watch.as_values(data), **options)),
        (torch.Tensor, "pin_memory", lambda tensor, device=None: watch.pin(tensor)),
        (FakeTensor, "tolist", lambda tensor: watch.to_list(tensor)),
        (torch.nn.Module, "cuda", _move),
        (torch.cuda, "synchronize", lambda device=None: watch.note_wait("synchronize")),
        (torch.cuda.Event, "synchronize", lambda event: watch.note_wait("an event")),
        (torch.cuda.Stream, "synchronize", lambda stream: watch.note_wait("a stream")),
        (torch.distributed, "TCPStore", lambda *args, **options: FakeStore()),
        (torch.distributed, "init_process_group", join_fake),
        (torch.distributed, "new_group", new_fake_group),
        (torch.distributed, "all_gather_object", gather_objects),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        stack.enter_context(mode)
        stack.enter_context(watch)
        yield


def _move(module: Any, device: Any = None) -> Any:
    """Move a module to the GPU, as `Module.cuda`, which cannot swap fake parameters, would."""
    import torch

    for part in module.modules():
        for name, value in part._parameters.items():
            if value is None or value.is_cuda:
                continue
            moved = torch.nn.Parameter(value.detach().to("cuda"), value.requires_grad)
            for mark, content in vars(value).items():
                vars(moved).setdefault(mark, content)
            part._parameters[name] = moved
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = value.to("cuda")
    return module
