"""The question whether kernels of ours, in Triton, run here: asked once for each module of them.

heads_kernels, softmax_kernels, expert_kernels
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def can_take(tensor: Tensor) -> bool:
    """Return whether a tensor is one for the kernels: on a GPU, not float64, and not empty."""
    return tensor.is_cuda and tensor.dtype is not torch.float64 and tensor.numel() > 0


@functools.cache
def load(name: str, trial: Callable[[ModuleType], Any], without: str) -> ModuleType | None:
    """Return a module of kernels if they run on this GPU. Warns once where they do not.

    Args:
        name: of the module, in this package.
        trial: runs one of its kernels on the GPU.
        without: a clause that says what is slower without them.
    """
    if importlib.util.find_spec("triton") is None:
        return None

    try:
        kernels = importlib.import_module(f"{__package__}.{name}")
        trial(kernels)
    except Exception as error:
        # Triton builds its launcher with the machine's C compiler, which may be missing.
        warnings.warn(
            f"{without}: Triton's kernels do not run here ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return None
    return kernels
