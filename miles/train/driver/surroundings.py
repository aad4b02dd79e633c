"""The surroundings of a run, for its record: the model, the hardware, the versions of the libraries.

Each start in `starts.jsonl` has them, as the next one may run elsewhere:

    "model":     {"family": "qwen3", "layers": 36, "parameters": 4022468096, …}
    "hardware":  {"gpu": "NVIDIA H100 80GB HBM3", "cpus": 64, "memory_bytes": …, "system": …}
    "versions":  {"python": "3.11.9", "torch": "2.13.0", …}

The hardware is that of the driver's machine, but for the GPU, which is that of rank 0. No name of a
machine or of a user is kept.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from miles.architecture.config import ModelShape
from miles.architecture.sizes import active_parameters, total_parameters

_PACKAGES = ("torch", "megatron-core", "ray", "transformers", "tokenizers", "pyarrow", "numpy")
_CPU_INFO = Path("/proc/cpuinfo")


def surroundings(shape: ModelShape, gpu_name: str | None) -> dict[str, Any]:
    """Return what a start runs on: `model`, `hardware` and `versions`, as JSON-able values.

    Args:
        shape: of the model.
        gpu_name: of rank 0; None: it runs on a CPU.
    """
    return {"model": _model(shape), "hardware": _hardware(gpu_name), "versions": _versions()}


def _model(shape: ModelShape) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "family": shape.model_type,
        "parameters": total_parameters(shape),
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "attention_heads": shape.num_attention_heads,
        "key_value_heads": shape.num_query_groups,
        "vocabulary": shape.vocab_size,
        "positions": shape.max_position_embeddings,
    }
    if shape.num_experts is not None:
        facts["active_parameters"] = active_parameters(shape)
        facts["experts"] = shape.num_experts
        facts["experts_per_token"] = shape.moe_router_topk
    return facts


def _hardware(gpu_name: str | None) -> dict[str, Any]:
    return {
        "gpu": gpu_name,
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu_name() -> str | None:
    """Return the name that the processor gives itself; None where Linux does not tell it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        label, _, text = line.partition(":")
        if label.strip() == "model name":
            return text.strip()
    return None


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what a run computes. Imports none."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a build that is on the path without being installed
            continue
    return versions
