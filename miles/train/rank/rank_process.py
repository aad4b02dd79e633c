"""Make a process one rank of a run: kernels, the CPU layer, process groups. No Ray in here."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import torch

from miles.train.model import device, megatron_on_cpu, process_groups
from miles.train.parallel_layout import Layout


def be_deterministic() -> None:
    """Use only kernels that give the same bits each time, in this whole process.

    Call it before anything runs on a GPU.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Otherwise torch would also fill every new tensor with NaN, which is a help for debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False


_NOT_USED = ("wandb", "tensorboard")
"""Packages that megatron-core 0.16.1 imports where they are there, for what no rank does: to log
its timers and an inference server. They take a process half a second. The driver has our sinks."""


def load_megatron() -> None:
    """Import Megatron, on the CPU layer where there is no GPU. A second call does nothing."""
    with _hidden(_NOT_USED):
        if not device.has_gpu():
            megatron_on_cpu.activate()
        from megatron.core import parallel_state, tensor_parallel

        del parallel_state, tensor_parallel


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Have packages that are not imported yet look as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None, for an import
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def start_rank(
    layout: Layout,
    rank: int,
    address: str,
    seed: int,
    timeout_minutes: float,
    listener: socket.socket | None = None,
) -> None:
    """Make this process rank `rank`: the CPU layer where there is no GPU, then the process groups.

    Arguments as for `process_groups.initialize`.
    """
    _unpickle_plain_values_only()
    load_megatron()
    if not device.has_gpu():
        torch.set_num_threads(1)
    process_groups.initialize(layout, rank, address, seed, timeout_minutes, listener)


def _unpickle_plain_values_only() -> None:
    """Have every `torch.load` of this process refuse code, whatever its caller asks for.

    torch 2.13 loads the objects of a `torch_dist` checkpoint with `weights_only=False`, and Megatron
    leaves it to the environment: a checkpoint of a stranger could run any command.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
