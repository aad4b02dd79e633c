"""A Hugging Face checkpoint -> Megatron `torch_dist`, readable at any layout, tensor by tensor.

    DIR/config.json, *.safetensors   ->   SAVE/release/…
                                          SAVE/latest_checkpointed_iteration.txt ("release", last)

Everything is planned from the headers of the files. A mismatch is refused there, before the
first byte is written.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.architecture.families import extra_states_of, pieces_of, read_shape
from miles.architecture.sizes import padded_vocab_size
from miles.common import atomic_folders, storage
from miles.common.checkpoint_files import iterations
from miles.common.checkpoint_tracker import RELEASE, TRACKER, tracked, write_tracker
from miles.common.ctrl_c import on_ctrl_c
from miles.common.debugging import unchained
from miles.common.writable import require_writable
from miles.convert import parallel, tensor_io, torch_dist
from miles.convert.hf_boxes import HfTensors
from miles.convert.megatron_boxes import Tensors
from miles.convert.path_safety import require_inside
from miles.convert.remote_lease import hold_remote
from miles.convert.safetensors_files import Weights, is_weights
from miles.convert.torch_dist import Box
from miles.errors import CheckpointError, SourceError

MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class _Content:
    """A checkpoint that is to be written."""

    boxes: Sequence[Box]
    object_keys: Sequence[str]
    """of its empty objects"""
    args: argparse.Namespace


@unchained
@on_ctrl_c("stopped; nothing of it is left, and the folder to write is as it was")
def hf_to_megatron(
    hf_checkpoint: str,
    save: str,
    *,
    make_vocab_size_divisible_by: int = 1,
    console: Console | None = None,
) -> str:
    """Convert a checkpoint. Tensors keep their dtype.

    Args:
        hf_checkpoint: folder (fsspec URL) with config.json and safetensors.
        save: folder (fsspec URL) to create, or one that an earlier conversion created.
        make_vocab_size_divisible_by: rows of zeros are added to the embedding and the output layer,
            up to the next multiple; 1: none. A model that loads the checkpoint must have the same
            number of rows, or ignore the added ones.
        console: shows a bar; None: nothing is shown.

    Returns:
        the checkpoint's folder, `SAVE/release`.

    Raises:
        CheckpointError: names the file and tensor that is missing, unexpected, or of another shape;
            a `save` that is `hf_checkpoint`, or the folder of a run.
    """
    require_inside(hf_checkpoint, "config.json", hf_checkpoint)
    shape = read_shape(hf_checkpoint)
    if storage.is_same(save, hf_checkpoint):
        raise CheckpointError(f"{save}: is --hf-checkpoint itself: give another folder")
    require_no_run(save)
    require_writable(save, "--save")

    num_rows = padded_vocab_size(shape, make_vocab_size_divisible_by)
    watch = partial(parallel.bar, console, "downloading")
    try:
        with storage.local_folder(
            hf_checkpoint, "Hugging Face checkpoint", is_weights, watch
        ) as source:
            tensors = HfTensors(Weights(str(source), hf_checkpoint), shape)
            tensors.require_equal_copies()
            return write_release(tensors, shape, save, num_rows, console)
    except SourceError as error:
        raise CheckpointError(str(error)) from error


def write_release(
    tensors: Tensors, shape: ModelShape, save: str, num_rows: int, console: Console | None
) -> str:
    """Write Megatron tensors as a converted checkpoint, which appears when it is complete.

    Args:
        tensors: of a model.
        shape: of the model.
        save: folder (fsspec URL) that `require_no_run` let pass.
        num_rows: of the embedding and the output layer, with rows of padding.
        console: shows a bar; None: nothing is shown.

    Returns:
        the checkpoint's folder, `SAVE/release`.
    """
    content = _Content(
        boxes=_plan(tensors, shape, num_rows),
        object_keys=_object_keys(shape),
        args=shape.checkpoint_args(padded_vocab_size=num_rows),
    )
    if storage.is_local(save):
        _save_locally(save, content, console)
    else:
        _save_remotely(save, content, console)
    return storage.join(save, RELEASE)


def require_no_run(save: str) -> None:
    """Refuse a folder with the checkpoints of a run: its tracker would be replaced.

    Raises:
        CheckpointError: names what is there, and what to do.
    """
    name, _ = tracked(save) or (RELEASE, 0)
    if name != RELEASE:
        raise CheckpointError(
            f"{save}: holds the checkpoints of a run ({TRACKER} names {name}): give another folder"
        )
    if iterations(save):
        raise CheckpointError(
            f"{save}: holds the checkpoints of a run that no {TRACKER} names: give another folder"
        )


def _save_locally(save: str, content: _Content, console: Console | None) -> None:
    """Write the checkpoint beside its place, move it there, and name it in the tracker."""
    root = Path(storage.filesystem(save)[1])
    with contextlib.ExitStack() as undone:
        if not root.exists():
            undone.callback(_remove_empty, root)
        with atomic_folders.appearing(root / RELEASE) as folder:
            _write(folder, content, console)
            (root / TRACKER).unlink(missing_ok=True)  # it names the one that is replaced
        undone.pop_all()
    write_tracker(str(root), RELEASE)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody has put something there
        folder.rmdir()


def _save_remotely(save: str, content: _Content, console: Console | None) -> None:
    """Write the checkpoint on this machine and upload it, the tracker last."""
    with storage.temporary_folder("miles-convert-") as root:
        (root / RELEASE).mkdir()
        _write(root / RELEASE, content, console)
        write_tracker(str(root), RELEASE)

        with hold_remote(save):
            require_no_run(save)  # one may have begun, and ended, meanwhile
            storage.remove(storage.join(save, TRACKER))
            storage.remove(storage.join(save, RELEASE))
            storage.upload_folder(root, save, TRACKER, partial(parallel.bar, console, "uploading"))


def _plan(tensors: Tensors, shape: ModelShape, padded_vocab_size: int) -> list[Box]:
    """Return the boxes to write, in the model's order."""
    boxes = []
    for parameter, place in pieces_of(shape):
        num_rows = padded_vocab_size if parameter.is_vocabulary else parameter.shape[0]
        sizes = (num_rows, *parameter.shape[1:])
        stack = parameter.stack(shape)

        box = Box(
            key=parameter.megatron,
            offsets=(*place, *(0 for _ in sizes)),
            sizes=(*(1 for _ in stack), *sizes),
            size=(*stack, *sizes),
            dtype=tensors.dtypes[parameter.megatron],
            make=partial(_make, tensors, parameter.megatron, place, sizes),
        )
        boxes.append(box)
        if parameter.second_key is not None:
            boxes.append(replace(box, key=parameter.second_key))
    return boxes


def _object_keys(shape: ModelShape) -> list[str]:
    """Return the keys of the empty objects that Megatron's loader asks for."""
    keys: list[str] = []
    for state in extra_states_of(shape):
        keys += state.object_keys(shape)
    return keys


def _make(tensors: Tensors, key: str, place: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return a Megatron tensor at one place of its leading axes.

    Args:
        sizes: with the rows of padding.
    """
    target = tensor_io.buffer("whole", sizes, tensors.dtypes[key])
    return tensors.read(key, place, [0 for _ in sizes], target)


def _write(folder: Path, content: _Content, console: Console | None) -> None:
    """Write the files of a checkpoint into an empty folder, several at a time."""
    num_bytes = sum(box.num_bytes for box in content.boxes)
    atomic_folders.require_room(folder, num_bytes)

    max_bytes = min(MAX_FILE_BYTES, -(-num_bytes // parallel.NUM_THREADS))
    files = parallel.grouped(content.boxes, lambda box: box.num_bytes, max_bytes)

    def write(number: int, report: storage.Report) -> list[tuple[Box, torch_dist.Place]]:
        places = torch_dist.write_boxes(folder, f"__0_{number}.distcp", files[number], report)
        return list(zip(files[number], places, strict=True))

    with parallel.bar(console, "converting", num_bytes) as report, torch_dist.without_checksums():
        written = parallel.each(range(len(files)), write, report)

    empty = torch_dist.write_empty_object(folder, f"__0_{len(files)}.distcp")
    objects = dict.fromkeys(content.object_keys, empty)
    places = list(itertools.chain.from_iterable(written))
    torch_dist.write_metadata(folder, places, content.args, objects)
