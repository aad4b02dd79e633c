"""The findings of a walk on a fake device: host waits, kernels, and what autograd keeps.

    wait     the host waits for the GPU: it reads a value, or copies without `non_blocking`
    kernel   an operation on the GPU, with the bytes that it reads and writes
    kept     a tensor that autograd keeps for the backward pass

Each is counted by the nearest line of ours or of Megatron's; in the backward pass, by the line of
the forward pass where there is no nearer one (with `torch.autograd.set_detect_anomaly`).
"""

from __future__ import annotations

import re
import sys
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import DataDependentOutputException, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_WAITS = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.bincount.default,
)
"""Operations that need a value of the GPU on the host."""
_INDEXING = (aten.index.Tensor, aten.index_put_.default)
_NO_KERNEL = ("prim::", "c10d::", "_c10d", "aten::empty", "aten::lift", "aten::new_empty")
_VIEWS = ("aten::detach", "aten::_unsafe_view", "aten::_reshape_alias")
_ZEROS = ("rope_utils", "_deviation")
"""Where the answer is no, or 0: "are these the frequencies of all positions?" asks Megatron, and we
ask how far cuDNN is off."""
_OURS = re.compile(r".*/(miles/\w+/.+|megatron/core/.+)$")
"""Files of ours and of Megatron's, less the folder before."""
_OF_FORWARD = re.compile(r'File "(.+)", line (\d+), in (\w+)')


@dataclass
class Findings:
    """The events of a part of a walk, by place."""

    waits: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    kernel_bytes: Counter[str] = field(default_factory=Counter)
    kept_bytes: dict[torch.dtype, Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )


class Watch(TorchDispatchMode):
    """Count what happens on the fake device. Enter it inside of `fake_device`.

    A value that is asked of the GPU is 1, and a list that of `known_lists` with its length, as far
    as there is one.
    """

    def __init__(self, known_lists: dict[int, list[int]]) -> None:
        super().__init__()
        self.found = Findings()
        self._known_lists = known_lists
        self._pinned: dict[int, Any] = {}
        self._kept: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = self._wait(func, args, kwargs)
        if reason:
            self.note_wait(reason)

        try:
            if func is aten.addmm.dtype_out:
                # torch 2.11's fake tensors take the number format for a factor.
                result = _product_into(*args[:3], args[3], **kwargs)
            else:
                result = func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not aten._local_scalar_dense.default:
                raise
            is_zero = any(name in place() for name in _ZEROS)
            return type(_one(args[0].dtype))(0) if is_zero else _one(args[0].dtype)
        except UnsupportedOperatorException:
            if func.namespace != "c10d":
                raise
            # Fake tensors know some collectives only. None of them changes a shape.
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)

        if not func.is_view and not func.name().startswith((*_NO_KERNEL, *_VIEWS)):
            self._count_kernel(str(func), tree_leaves((args, kwargs)), tree_leaves(result))
        return result

    def keep(self, value: Any) -> Any:
        """Count a tensor that autograd keeps, once. A hook of `saved_tensors_hooks`."""
        storage = value.untyped_storage()
        is_weight = isinstance(value, torch.nn.Parameter)
        if value.is_cuda and not is_weight and storage._cdata not in self._kept:
            self._kept[storage._cdata] = storage  # else its address might come again
            self.found.kept_bytes[value.dtype][place()] += storage.nbytes()
        return value

    def pin(self, tensor: Any) -> Any:
        """Return a copy of a tensor whose memory counts as pinned."""
        pinned = tensor.clone()
        storage = pinned.untyped_storage()
        self._pinned[storage._cdata] = storage
        return pinned

    def to_list(self, tensor: Any) -> Any:
        """Return the values of a tensor of which a list is asked."""
        if tensor.is_cuda:
            self.note_wait(f"tolist of {_type(tensor)}")
        values = [_one(tensor.dtype)] * tensor.numel()
        if tensor.dtype in (torch.int32, torch.int64):
            return self._known_lists.get(tensor.numel(), values)
        return values

    def as_values(self, data: Any) -> Any:
        """Return what `torch.tensor` is given, with numbers in place of tensors, which it reads."""

        def read(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.is_cuda:
                self.note_wait("torch.tensor of tensors")
            return _one(value.dtype)

        return tree_map(read, data) if isinstance(data, list) else data

    def note_wait(self, reason: str) -> None:
        """Count a wait of the host for the GPU."""
        self.found.waits[f"{place()}: {reason}"] += 1

    def note_launch(self, name: str, tensors: list[Any]) -> None:
        """Count a launch of a Triton kernel, with the bytes of all tensors that it is given."""
        self._count_kernel(f"triton {name}", tensors, tensors[:1])

    def _count_kernel(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        tensors = {id(v): v for v in (*inputs, *outputs) if isinstance(v, torch.Tensor)}
        if not any(tensor.is_cuda for tensor in tensors.values()):
            return
        where = f"{place()}: {name}"
        self.found.kernels[where] += 1
        self.found.kernel_bytes[where] += sum(tensor.nbytes for tensor in tensors.values())

    def _wait(self, func: Any, args: Any, kwargs: Any) -> str:
        """Return why an operation makes the host wait for the GPU; empty where it does not."""
        if func is aten.lift_fresh.default and args[0].is_cuda:
            return "a tensor on the GPU is made of Python values"
        if func in _WAITS and args[0].is_cuda:
            return f"{func} of {_type(args[0])}"
        if func in _INDEXING and any(i is not None and i.dtype is torch.bool for i in args[1]):
            # One number for all places of a mask is filled in: nobody has to count them.
            is_fill = len(args) > 2 and args[2].numel() == 1 and not args[2].is_cuda
            return "" if is_fill else f"{func} by a mask"
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            return f"{func} without output_size"
        if func is aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            return self._copy_wait(args[0], target, kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            return self._copy_wait(args[1], args[0].device, len(args) > 2 and args[2])
        return ""

    def _copy_wait(self, source: Any, target: Any, is_async: Any) -> str:
        """Return why a copy makes the host wait; empty where it does not."""
        if target.type == source.device.type:
            return ""
        if target.type == "cpu":
            return "" if is_async else f"a copy to the host, {_type(source)}"
        if not is_async:
            return f"a copy to the GPU without non_blocking, {_type(source)}"
        if source.untyped_storage()._cdata not in self._pinned:
            return f"a copy to the GPU from memory that is not pinned, {_type(source)}"
        return ""


def _product_into(total: Any, left: Any, right: Any, dtype: Any, *, out: Any, **_: Any) -> Any:
    """Check a sum in `dtype` of products, as CUDA's function does, and return where it goes."""
    assert left.dtype == right.dtype in (torch.bfloat16, torch.float16), (left, right)
    assert out.dtype == dtype == total.dtype == torch.float32, (total, dtype, out)
    assert left.is_cuda, left.device
    assert right.is_cuda, right.device
    assert total.is_cuda, total.device
    assert out.shape == total.shape == (left.shape[0], right.shape[1]), (total, left, right)
    assert left.shape[1] == right.shape[0], (left, right)
    return out


def place() -> str:
    """Return the nearest line of ours or of Megatron's: `miles/train/model/norm.py:27 forward`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = _OURS.match(frame.f_code.co_filename)
        if found:
            return f"{found[1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back

    node = torch._C._current_autograd_node()
    if node is None:
        return "nobody"
    lines = _OF_FORWARD.findall("".join(node.metadata.get("traceback_", ())))
    own = [
        f"{match[1]}:{line} {name}" for path, line, name in lines if (match := _OURS.match(path))
    ]
    return f"backward of {own[-1] if own else '?'} ({node.name()})"


def own_traceback(error: BaseException) -> str:
    """Return an error with the lines of its traceback that are ours or Megatron's, and the last."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = []
    for frame in frames:
        found = _OURS.match(frame.filename)
        if found or frame is frames[-1]:
            lines.append(f"{found[1] if found else frame.filename}:{frame.lineno}: {frame.line}")
    return "\n".join([*lines, f"{type(error).__name__}: {error}"])


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _type(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
