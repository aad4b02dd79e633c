"""Megatron's `torch_dist` folders, as far as converting needs them: names, sharded tensors, a process group."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.architecture import ModelShape
from miles.convert.families import Parameter, llama, qwen2, qwen3, qwen3_moe
from miles.errors import CheckpointError

# Megatron warns of this at import, four times over; neither plays a part in converting.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

TRACKER = "latest_checkpointed_iteration.txt"

_FAMILIES: dict[str, Callable[[ModelShape], tuple[Parameter, ...]]] = {
    "qwen3": qwen3.parameters,
    "qwen3_moe": qwen3_moe.parameters,
    "qwen2": qwen2.parameters,
    "llama": llama.parameters,
}


def parameters_of(shape: ModelShape) -> tuple[Parameter, ...]:
    """The parameter map of a shape's family."""
    return _FAMILIES[shape.model_type](shape)


def places_of(parameter: Parameter, shape: ModelShape) -> Iterator[tuple[int, ...]]:
    """Every place in a parameter's leading axes: (layer,), or (layer, expert); of one that is of no layer, just ()."""
    return itertools.product(*map(range, parameter.stack(shape)))


def sharded(parameter: Parameter, place: tuple[int, ...], tensor: Tensor, shape: ModelShape) -> Any:
    """The tensor of one place as a piece of the checkpoint's stacked one."""
    from megatron.core.dist_checkpointing import ShardedTensor

    sizes = parameter.stack(shape)
    offsets = [(axis, place[axis], sizes[axis]) for axis in range(len(place))]
    return ShardedTensor.from_rank_offsets(parameter.megatron, tensor, *offsets, prepend_axis_num=len(place))


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """What Megatron's checkpointing wants around it, while the context lasts.

    A process group: one of a single rank, where there is none. And, in a build of torch without CUDA, an answer to
    `torch.cuda.synchronize` and `torch.cuda.current_device`, which megatron-core 0.16.1 calls wherever it runs.
    """
    started = not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    synchronize, current_device = torch.cuda.synchronize, torch.cuda.current_device
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.current_device = lambda: torch.device("cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's, about Apex and Transformer Engine, which play no part here
            yield
    finally:
        torch.cuda.synchronize, torch.cuda.current_device = synchronize, current_device
        if started:
            torch.distributed.destroy_process_group()


def newest(folder: Path, where: str) -> Path:
    """The complete checkpoint that the tracker file names.

    Raises:
        CheckpointError: there is none.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{where}: no Megatron checkpoint there: {TRACKER} is missing")
    word = tracker.read_text().strip()
    if word != "release" and not word.isdigit():
        raise CheckpointError(f"{where}/{TRACKER}: expected an iteration or 'release', found {word[:40]!r}")
    checkpoint = folder / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not (checkpoint / "metadata.json").is_file():
        raise CheckpointError(f"{where}: {TRACKER} names {checkpoint.name}, which is not there or is not complete")
    return checkpoint


def read_args(checkpoint: Path) -> dict[str, Any]:
    """`args` of a checkpoint's common.pt, without unpickling anything but plain values."""
    # Not the context manager: it would take the class out of the list again, where Megatron's loader needs it.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        common = torch.load(checkpoint / "common.pt", weights_only=True)
    except Exception as error:  # of pickle or of the zip file, by what is wrong
        raise CheckpointError(f"{checkpoint}/common.pt: cannot be read ({error})") from error
    return dict(vars(common["args"])) if "args" in common else {}
