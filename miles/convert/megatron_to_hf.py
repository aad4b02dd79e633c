"""Megatron `torch_dist` -> a Hugging Face checkpoint, with the names and files that it came with.

    LOAD/iter_0000100/…                            ->   SAVE/*.safetensors
    DIR/config.json, tokenizer.json, …             ->   SAVE/config.json, tokenizer.json, …

A checkpoint of a LoRA run holds an adapter, which becomes a folder in PEFT's format:

    LOAD/iter_0000100/…                            ->   SAVE/adapter_model.safetensors
                                                        SAVE/adapter_config.json
    DIR/tokenizer.json, …                          ->   SAVE/tokenizer.json, …

Files are created at their full size. Each tensor goes to its place in them, in whatever order it
comes.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

from miles.architecture.adapter import adapter_parameters
from miles.architecture.config import ModelShape
from miles.architecture.families import parameters_of, read_shape, stored_names
from miles.architecture.parameters import Parameter
from miles.common import atomic_folders, checkpoint_folder, storage
from miles.common.checkpoint_tracker import RELEASE
from miles.common.ctrl_c import on_ctrl_c
from miles.common.debugging import unchained
from miles.common.lease import LEASE
from miles.common.writable import require_writable
from miles.convert import parallel, torch_dist
from miles.convert.companions import TEMPLATE, companions, is_tokenizer
from miles.convert.export_plan import ExportPlan, FilesPlan
from miles.convert.megatron_boxes import MegatronTensors, Tensors, require_model, tensors_of
from miles.convert.path_safety import require_inside
from miles.convert.peft_adapter import AdapterPlan
from miles.convert.peft_config import CONFIG
from miles.convert.remote_lease import hold_remote
from miles.convert.safetensors_files import is_weights
from miles.convert.safetensors_headers import ADAPTER, INDEX, SINGLE
from miles.convert.saved_adapter import saved_adapter, saved_base
from miles.convert.torch_dist import Checkpoint
from miles.errors import CheckpointError, ConfigError, SourceError

_COMPLETING = (INDEX, SINGLE, CONFIG)
"""The first of these files that an export has makes it complete."""


@unchained
@on_ctrl_c("stopped; nothing of it is left, and the folder to write is as it was")
def megatron_to_hf(
    load: str,
    hf_checkpoint: str,
    save: str,
    *,
    iteration: int | None = None,
    max_shard_bytes: int | None = None,
    chat_template: str | None = None,
    console: Console | None = None,
) -> str:
    """Convert a checkpoint. Rows of padding behind the vocabulary are left out.

    Args:
        load: folder (fsspec URL) with the tracker file, or a checkpoint in it.
        hf_checkpoint: folder whose configuration, tokenizer and template files are copied. Where it
            holds weights, the tensors are written in the dtypes that they have there; otherwise in
            the dtype of config.json. Without weights, a checkpoint that was only converted keeps
            its own dtypes, and an adapter always does.
        save: folder (fsspec URL) to create, or one that an earlier conversion created. It appears
            when it is complete.
        iteration: of the checkpoint; None: the newest.
        max_shard_bytes: of a safetensors file, unless one tensor is larger; None: the files of
            `hf_checkpoint`, or where it holds no weights, 5 GB.
        chat_template: to write in place of that of `hf_checkpoint`; None: the one that the run of
            the checkpoint was given, if it was given any.
        console: shows a bar; None: nothing is shown.

    Returns:
        `save`.

    Raises:
        CheckpointError: a checkpoint that is missing, incomplete, or of another model; a `save`
            that holds other things.
        ConfigError: `max_shard_bytes` of an adapter, which is one file.
    """
    require_inside(hf_checkpoint, "config.json", hf_checkpoint)
    shape = read_shape(hf_checkpoint)
    _require_folder(save, hf_checkpoint)

    try:
        url = torch_dist.newest(load, iteration)
        adapter = saved_adapter(url)
        if adapter is not None and max_shard_bytes is not None:
            raise ConfigError(
                f"--max-shard-size: {url} holds an adapter, which is one file: leave it out"
            )
        require_replaceable(save, hf_checkpoint, is_adapter=adapter is not None)
        require_writable(save, "--save")

        watch = partial(parallel.bar, console, "downloading")
        with storage.local_folder(url, "Megatron checkpoint", watch=watch) as source:
            checkpoint = Checkpoint(source, url)
            require_model(checkpoint, hf_checkpoint, shape)
            plan: FilesPlan
            if adapter is None:
                tensors = MegatronTensors(checkpoint, shape, parameters_of(shape))
                plan = ExportPlan(
                    hf_checkpoint,
                    shape,
                    tensors.dtypes,
                    is_converted=posixpath.basename(url) == RELEASE,
                    max_shard_bytes=max_shard_bytes,
                )
            else:
                parameters = adapter_parameters(shape, adapter)
                tensors = MegatronTensors(checkpoint, shape, parameters)
                base = saved_base(url)
                plan = AdapterPlan(hf_checkpoint, shape, adapter, tensors.dtypes, base=base)

            template = template_of(str(source)) if chat_template is None else chat_template
            with folder_for(save, console) as folder:
                write_weights(tensors, shape, plan, folder, console)
                plan.complete(folder, template)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    return save


def template_of(checkpoint: str) -> str | None:
    """Return the chat template that the run of a checkpoint was given; None: it was given none."""
    content = checkpoint_folder.read_extra(checkpoint) or {}
    return content.get(checkpoint_folder.CHAT_TEMPLATE)


@contextlib.contextmanager
def folder_for(save: str, console: Console | None) -> Iterator[Path]:
    """Yield an empty local folder whose files are in `save` when the context ends."""
    if storage.is_local(save):
        with atomic_folders.appearing(Path(storage.filesystem(save)[1])) as folder:
            yield folder
        return
    with storage.temporary_folder("miles-convert-") as folder:
        yield folder
        _replace_remote(folder, save, console)


def _replace_remote(folder: Path, save: str, console: Console | None) -> None:
    """Upload a folder to the place of an earlier one; what makes it complete goes last."""
    last = next(name for name in _COMPLETING if (folder / name).exists())
    with hold_remote(save):
        # First what says that it is complete.
        for name in sorted(storage.names(save), key=lambda name: name not in _COMPLETING):
            if name != LEASE:
                storage.remove(storage.join(save, name))
        storage.upload_folder(folder, save, last, partial(parallel.bar, console, "uploading"))


def require_replaceable(save: str, hf_checkpoint: str, *, is_adapter: bool = False) -> None:
    """Refuse a folder with files that no conversion of `hf_checkpoint` writes: they would be lost.

    Args:
        is_adapter: an adapter of it is written; what belongs to a model would be lost, too.

    Raises:
        CheckpointError: names what is there.
        WriteError: a disk is mounted there.
    """
    _require_folder(save, hf_checkpoint)
    beside = [*companions(hf_checkpoint), TEMPLATE, LEASE]
    if is_adapter:
        beside = [*filter(is_tokenizer, beside), CONFIG, ADAPTER, LEASE]
    known = {name.split("/")[0] for name in beside}
    if not storage.exists(save):
        return
    stray = [name for name in storage.names(save) if name not in known]
    if not is_adapter:
        stray = [name for name in stray if not is_weights(name)]
    if stray:
        what = "export of an adapter" if is_adapter else f"conversion of {hf_checkpoint}"
        raise CheckpointError(
            f"{save}: holds {', '.join(stray[:3])}, which no {what} writes, and which would be "
            "removed: give another folder"
        )


def _require_folder(save: str, hf_checkpoint: str) -> None:
    """Refuse a place that no conversion can put a folder into.

    Raises:
        CheckpointError: it is a file, or `hf_checkpoint` itself.
        WriteError: a disk is mounted there.
    """
    if storage.is_local(save):
        atomic_folders.require_movable(Path(storage.filesystem(save)[1]))
    if not storage.exists(save):
        return
    if storage.is_same(save, hf_checkpoint):
        raise CheckpointError(f"{save}: is --hf-checkpoint itself: give another folder")
    if not storage.is_folder(save):
        raise CheckpointError(f"{save}: a file, not a folder: give another place")


def write_weights(
    tensors: Tensors,
    shape: ModelShape,
    plan: FilesPlan,
    folder: Path,
    console: Console | None,
) -> None:
    """Write the weights, and their index, into an empty local folder."""
    with parallel.bar(console, "converting", plan.num_bytes) as report:
        writer = plan.create(folder)

        def convert(piece: tuple[Parameter, tuple[int, ...]], report: storage.Report) -> None:
            for name, tensor in tensors_of(tensors, *piece).items():
                for target in stored_names(name, shape, plan.tensors):
                    writer.write(target, tensor.to(plan.tensors[target].dtype))
                    report(plan.tensors[target].num_bytes)

        try:
            parallel.each(plan.pieces, convert, report)
            writer.sync()
        finally:
            writer.close()
