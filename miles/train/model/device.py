"""The device that this process computes on: its GPU where there is one, else the CPU."""

from __future__ import annotations

import torch


def has_gpu() -> bool:
    return torch.cuda.is_available()


def torch_device() -> str:
    """Return the device's name for torch: "cuda" or "cpu"."""
    return "cuda" if has_gpu() else "cpu"


def gpu_name() -> str | None:
    """Return the GPU's product name, such as "NVIDIA H100 80GB HBM3"; None on a CPU."""
    return torch.cuda.get_device_name() if has_gpu() else None
