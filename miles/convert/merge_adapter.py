"""An adapter merged into the weights of its base, as a checkpoint like any other.

    DIR (PEFT's folder, or a LoRA run's --save)  +  the base   ->   SAVE/*.safetensors, …
                                                               ->   SAVE/release/… (torch_dist)

The files beside the weights, the names, dtypes and files of tensors are those of the base. A tensor
or two are in memory at a time, and both formats hold the same bits (`merged_tensors`).
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from miles.architecture.adapter import AdapterShape, adapter_parameters
from miles.architecture.config import ModelShape
from miles.architecture.families import parameters_of, pieces_of, read_shape, stored_names
from miles.architecture.sizes import padded_vocab_size
from miles.common import storage
from miles.common.checkpoint_folder import SavedCheckpoint, read_extra
from miles.common.checkpoint_tracker import RELEASE, TRACKER
from miles.common.debugging import unchained
from miles.common.near_names import meant_path
from miles.common.untrusted_files import require_readable
from miles.common.writable import require_writable
from miles.convert import parallel, torch_dist
from miles.convert.base_checksum import require_base
from miles.convert.companions import TEMPLATE
from miles.convert.expected_tensors import require_same_model
from miles.convert.export_plan import ExportPlan
from miles.convert.hf_boxes import HfTensors
from miles.convert.hf_to_megatron import require_no_run, write_release
from miles.convert.megatron_boxes import MegatronTensors, Tensors, require_model
from miles.convert.megatron_to_hf import (
    folder_for,
    require_replaceable,
    template_of,
    write_weights,
)
from miles.convert.merged_tensors import MergedTensors
from miles.convert.path_safety import require_inside
from miles.convert.peft_adapter import read_adapter
from miles.convert.peft_config import CONFIG
from miles.convert.safetensors_files import Weights, is_weights
from miles.convert.saved_adapter import saved_adapter
from miles.convert.torch_dist import Checkpoint
from miles.errors import CheckpointError, ConfigError, SourceError


@dataclass(frozen=True)
class Targets:
    """The folders that merged weights are written to, and how."""

    hugging_face: str | None
    """folder (fsspec URL) of a Hugging Face checkpoint; None: none is written"""
    megatron: str | None
    """folder of a `torch_dist` checkpoint; None: none is written"""
    max_shard_bytes: int | None = None
    """of a safetensors file, as `megatron_to_hf` has it"""
    make_vocab_size_divisible_by: int = 1
    """of the `torch_dist` checkpoint, as `hf_to_megatron` has it"""

    @property
    def folders(self) -> dict[str, str]:
        """The folders that are written, by their flags."""
        given = {"--save": self.hugging_face, "--save-megatron": self.megatron}
        return {flag: folder for flag, folder in given.items() if folder is not None}


@dataclass(frozen=True)
class _Adapter:
    """An adapter that is open."""

    url: str
    shape: AdapterShape
    tensors: Tensors
    chat_template: str | None
    """that its run was given; None: that of the base"""
    checkpoint: SavedCheckpoint | None = None
    """of the LoRA run; None: a folder in PEFT's format, which says nothing about its base"""


@dataclass(frozen=True)
class _Base:
    """The weights of the model, open."""

    tensors: Tensors
    is_converted: bool
    """no run has trained them"""


@unchained
def merge_adapter(
    adapter: str,
    hf_checkpoint: str,
    targets: Targets,
    *,
    ref_load: str | None = None,
    iteration: int | None = None,
    chat_template: str | None = None,
    console: Console | None = None,
) -> list[str]:
    """Merge an adapter. Each folder appears when it is complete.

    Args:
        adapter: folder (fsspec URL) in PEFT's format, or with the checkpoints of a LoRA run, or one
            of these.
        hf_checkpoint: folder whose configuration, tokenizer and template files are copied. Where it
            holds weights, merged ones are written in the dtypes that they have there.
        targets: the folders to create, or to replace where an earlier conversion created them.
        ref_load: folder with the weights of the base, of either format; None: `hf_checkpoint`.
        iteration: of the LoRA run's checkpoint; None: the newest.
        chat_template: to write in place of that of `hf_checkpoint`; None: the one that the adapter
            comes with, if any.
        console: shows a bar; None: nothing is shown.

    Returns:
        the checkpoints that were written.

    Raises:
        CheckpointError: an adapter or a base that is missing, incomplete, or of another model; a
            folder that holds other things.
        ConfigError: no folder to write is given, or one that is in use.
    """
    require_inside(hf_checkpoint, "config.json", hf_checkpoint)
    shape = read_shape(hf_checkpoint)
    base_url = ref_load or hf_checkpoint
    sources = {"--adapter": adapter, "--hf-checkpoint": hf_checkpoint, "--ref-load": base_url}
    _require_targets(targets, hf_checkpoint, sources)

    try:
        with (
            _one_thread_a_product(),
            _opened_adapter(adapter, shape, iteration, console) as opened,
            _opened_base(base_url, shape, console) as base,
        ):
            if opened.checkpoint is not None:
                require_base(base_url, base.tensors, shape, opened.checkpoint, console)
            plan = ExportPlan(
                hf_checkpoint,
                shape,
                base.tensors.dtypes,
                is_converted=base.is_converted,
                max_shard_bytes=targets.max_shard_bytes,
            )
            merged = MergedTensors(
                base.tensors,
                opened.tensors,
                shape=shape,
                adapter_shape=opened.shape,
                dtypes=_dtypes_of(plan, shape, hf_checkpoint),
                where=opened.url,
            )

            written = []
            if targets.hugging_face is not None:
                with folder_for(targets.hugging_face, console) as folder:
                    write_weights(merged, shape, plan, folder, console)
                    plan.complete(folder, chat_template or opened.chat_template)
                written.append(targets.hugging_face)
            if targets.megatron is not None:
                num_rows = padded_vocab_size(shape, targets.make_vocab_size_divisible_by)
                folder_url = write_release(merged, shape, targets.megatron, num_rows, console)
                written.append(folder_url)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    return written


def _require_targets(targets: Targets, hf_checkpoint: str, sources: Mapping[str, str]) -> None:
    """Refuse folders in which something would be lost, before anything is read.

    Args:
        sources: the folders that are read, by their flags.
    """
    folders = targets.folders
    if not folders:
        raise ConfigError(
            "nothing is to be written: give --save for a Hugging Face checkpoint, --save-megatron "
            "for a torch_dist one, or both"
        )
    for flag, folder in folders.items():
        others = {**sources, **{name: url for name, url in folders.items() if name != flag}}
        for name, url in others.items():
            if storage.is_within(url, folder):
                raise ConfigError(
                    f"{flag} {folder}: is, or holds, {name} {url}, which would be lost: give a "
                    "folder of its own"
                )

    if targets.hugging_face is not None:
        require_replaceable(targets.hugging_face, hf_checkpoint)
    if targets.megatron is not None:
        require_no_run(targets.megatron)
    for flag, folder in folders.items():
        require_writable(folder, flag)


@contextlib.contextmanager
def _opened_adapter(
    url: str, shape: ModelShape, iteration: int | None, console: Console | None
) -> Iterator[_Adapter]:
    """Open an adapter of either format. A remote checkpoint is copied while the context lasts."""
    if storage.exists(storage.join(url, CONFIG)):
        if iteration is not None:
            raise ConfigError(
                f"--ckpt-step {iteration}: {url} is a folder in PEFT's format, which has no steps: "
                "leave it out"
            )
        adapter = read_adapter(url, shape)
        yield _Adapter(url, adapter.shape, adapter, _template_beside(url))
        return

    if not storage.exists(url):
        raise CheckpointError(
            f"--adapter {url}: no such folder: give one with an adapter in PEFT's format, or with "
            f"the checkpoints of a LoRA run{meant_path(url)}"
        )
    if not _is_megatron(url):
        raise CheckpointError(
            f"{url}: neither an adapter in PEFT's format ({CONFIG}) nor the checkpoints of a LoRA "
            f"run ({TRACKER}): give a folder with one of them"
        )
    checkpoint_url = torch_dist.newest(url, iteration)
    adapter_shape = saved_adapter(checkpoint_url)
    if adapter_shape is None:
        raise CheckpointError(
            f"{checkpoint_url}: holds a model's own weights, no adapter: there is nothing to merge. "
            "miles convert megatron-to-hf converts it"
        )
    watch = partial(parallel.bar, console, "downloading")
    with storage.local_folder(checkpoint_url, "Megatron checkpoint", watch=watch) as folder:
        checkpoint = Checkpoint(folder, checkpoint_url)
        require_model(checkpoint, "--hf-checkpoint", shape)
        parameters = adapter_parameters(shape, adapter_shape)
        tensors = MegatronTensors(checkpoint, shape, parameters)
        yield _Adapter(
            checkpoint_url,
            adapter_shape,
            tensors,
            template_of(str(folder)),
            SavedCheckpoint(checkpoint_url, 0, read_extra(str(folder))),
        )


@contextlib.contextmanager
def _opened_base(url: str, shape: ModelShape, console: Console | None) -> Iterator[_Base]:
    """Open the weights of a base of either format. Remote ones are copied meanwhile."""
    watch = partial(parallel.bar, console, "downloading")
    if not _is_megatron(url):
        require_same_model(url, shape)
        with storage.local_folder(url, "Hugging Face checkpoint", is_weights, watch) as folder:
            hf_tensors = HfTensors(Weights(str(folder), url), shape)
            hf_tensors.require_equal_copies()
            _require_floats(url, hf_tensors.dtypes)
            yield _Base(hf_tensors, is_converted=True)
        return

    checkpoint_url = torch_dist.newest(url)
    if saved_adapter(checkpoint_url) is not None:
        raise CheckpointError(
            f"{checkpoint_url}: holds an adapter, not the weights of a base: give the folder that "
            "its run began from"
        )
    with storage.local_folder(checkpoint_url, "Megatron checkpoint", watch=watch) as folder:
        checkpoint = Checkpoint(folder, checkpoint_url)
        require_model(checkpoint, "--hf-checkpoint", shape)
        tensors = MegatronTensors(checkpoint, shape, parameters_of(shape))
        _require_floats(checkpoint_url, tensors.dtypes)
        yield _Base(tensors, is_converted=posixpath.basename(checkpoint_url) == RELEASE)


@contextlib.contextmanager
def _one_thread_a_product() -> Iterator[None]:
    """Have torch compute in the threads of the conversion, not in others for each of them.

    On a busy machine those wait for each other: a merge took up to fifteen times as long.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _is_megatron(url: str) -> bool:
    names = (TRACKER, "metadata.json")
    return any(storage.exists(storage.join(url, name)) for name in names)


def _template_beside(url: str) -> str | None:
    """Return the chat template in the folder of an adapter; None where there is none."""
    require_inside(url, TEMPLATE, url)
    path = storage.join(url, TEMPLATE)
    if not storage.exists(path):
        return None
    require_readable(path, CheckpointError)
    return storage.read_text(path)


def _require_floats(where: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse quantized weights, to which nothing can be added."""
    for key, dtype in dtypes.items():
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise CheckpointError(
                f"{where}: the tensors of {key} are {dtype}: nothing can be merged into quantized "
                "weights; give a folder with bfloat16, float16 or float32"
            )


def _dtypes_of(plan: ExportPlan, shape: ModelShape, where: str) -> dict[str, torch.dtype]:
    """Return the dtype that each Megatron tensor is rounded to: that of its parts in a plan."""
    dtypes: dict[str, torch.dtype] = {}
    for parameter, place in pieces_of(shape):
        for name in parameter.hf_names(place):
            (target, *_) = stored_names(name, shape, plan.tensors)
            dtype = plan.tensors[target].dtype
            if dtypes.setdefault(parameter.megatron, dtype) != dtype:
                raise CheckpointError(
                    f"{where}: tensor {target} is {dtype}, others that Megatron keeps in one tensor "
                    f"with it ({parameter.megatron}) are {dtypes[parameter.megatron]}: one dtype "
                    "was expected"
                )
    return dtypes
