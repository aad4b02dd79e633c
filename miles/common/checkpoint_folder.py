"""A folder of checkpoints in Megatron's `torch_dist` layout: finding, naming and removing them.

    SAVE/iter_0000100/                      the checkpoint: model, optimizer, schedule, args
    SAVE/iter_0000100/miles.json            the data cursor and the position in metrics.jsonl
    SAVE/latest_checkpointed_iteration.txt  "100": written last; a checkpoint is complete when it
                                            is named here

No torch is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.common import own_files, storage
from miles.common.checkpoint_choice import merging, ways_on
from miles.common.checkpoint_files import (
    MARK,
    is_complete,
    iterations,
    missing_files,
    named_missing,
    stores_adapter,
)
from miles.common.checkpoint_tracker import TRACKER, folder_name, tracked
from miles.errors import (
    BrokenFileError,
    CheckpointError,
    MissingFileError,
    SourceError,
    WriteError,
)

EXTRA = "miles.json"
CHAT_TEMPLATE = "chat_template"
"""Key in it: the text of the template that `--chat-template-path` gave, for an export. Missing
where the run took the tokenizer's own."""
PRECISION = "precision"
"""Key in it: the format that the run computed in. Missing in older ones."""
EXPERT_CHOICES = "expert_choices"
"""Key in it: how often each expert was chosen in the last step, over all layers. Missing where
experts are not balanced."""
ADAPTER = "adapter"
"""Key in it: the shape of the adapter whose tensors the checkpoint holds in place of a model's.
Missing where all weights are trained."""
BASE = "base"
"""Key beside it: the folder of the frozen weights (`url`), and what tells them from others
(`checksums`)."""
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
"""The files of an adapter in PEFT's format."""
SAVING = ".saving-"
"""Begins the name of a folder that is not a checkpoint yet, or never became one."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint, or the weights of a Hugging Face folder."""

    url: str
    """its own folder, `…/iter_0000100` or `…/release`; or a Hugging Face folder"""
    iteration: int
    """optimizer steps taken; 0 for a converted one"""
    extra: dict[str, Any] | None
    """content of `miles.json`; None for a checkpoint that this trainer did not write"""
    is_hugging_face: bool = False
    """the weights of a Hugging Face folder; else a `torch_dist` checkpoint"""

    @property
    def is_converted(self) -> bool:
        """Return whether no step was taken yet: `release`, or a Hugging Face folder."""
        return self.iteration == 0

    @property
    def has_adapter(self) -> bool:
        """Return whether it holds the adapter of a LoRA run, and so no whole model."""
        return ADAPTER in (self.extra or {})


def find(url: str, *, weights_only: bool = False) -> SavedCheckpoint | None:
    """Return the newest complete checkpoint of a folder (fsspec URL); None where there is none.

    Args:
        weights_only: a `miles.json` that cannot be read does not matter.

    Raises:
        CheckpointError: the tracker names a checkpoint that is not there or has lost files, or is
            not a tracker; or its `miles.json` cannot be read.
    """
    try:
        named = tracked(url)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {ways_on(url)}") from error
    if named is None:
        return None
    name, iteration = named
    folder = storage.join(url, name)
    _require_files(folder)

    content = None
    try:
        content = read_extra(folder)
    except BrokenFileError as error:
        if not weights_only:
            raise CheckpointError(
                f"{error}. It holds the place in the data, and nothing can go on without it. "
                f"{other_ways(folder)}"
            ) from error
    return SavedCheckpoint(folder, iteration, content)


def read_extra(folder: str) -> dict[str, Any] | None:
    """Return the content of a checkpoint's `miles.json`; None where there is none.

    Raises:
        BrokenFileError: it is cut off, or not what was written.
    """
    try:
        return own_files.read_object(storage.join(folder, EXTRA))
    except MissingFileError:
        return None


def _require_files(folder: str) -> None:
    """Refuse a checkpoint that is not complete.

    Args:
        folder: that the tracker names.

    Raises:
        CheckpointError: names the files that are missing, and says what can be done.
    """
    missing = missing_files(folder)
    if not missing:
        return
    if MARK in missing:
        url = folder.rsplit("/", 1)[0]
        raise CheckpointError(
            f"{storage.join(url, TRACKER)} names {folder}, which is not there or not a torch_dist "
            f"checkpoint. {ways_on(url)}"
        )
    remedy = "Bring the files back, or begin anew with another --save"
    raise CheckpointError(
        f"{folder}: {named_missing(missing)}, so that the checkpoint cannot be read. "
        f"{_other_way(folder) or remedy}"
    )


def other_ways(folder: str) -> str:
    """Return what can be done where a checkpoint cannot be gone on from, in a sentence.

    Args:
        folder: of the checkpoint, `…/iter_0000500`.
    """
    url = folder.rstrip("/").rsplit("/", 1)[0]
    other_way = _other_way(folder)
    if other_way is not None:
        return other_way
    anew = "begin anew with another --save"
    if not stores_adapter(folder):
        anew = f"begin anew from its weights, with another --save and --ref-load {url}"
    return f"No other checkpoint in {url} can be gone on from: {anew}"


def _other_way(folder: str) -> str | None:
    """Return how to go on from the newest other checkpoint beside a folder; None: there is none."""
    url, name = folder.rstrip("/").rsplit("/", 1)
    tracker = storage.join(url, TRACKER)
    for step in reversed(iterations(url)):
        other = folder_name(step)
        if other != name and _can_go_on(storage.join(url, other)):
            return (
                f"The checkpoint of step {step} is whole: put {step} into {tracker}, and the same "
                "command goes on from there"
            )
    return None


def _can_go_on(folder: str) -> bool:
    """Return whether a checkpoint is complete, and its `miles.json` can be read."""
    try:
        return is_complete(folder) and "cursor" in (read_extra(folder) or {})
    except SourceError:
        return False


def find_start(
    save: str, load: str | None, ref_load: str | None, hf_checkpoint: str
) -> tuple[SavedCheckpoint, bool]:
    """Return the checkpoint to begin from, and whether to resume it or to take only its weights.

    1. A checkpoint of a run in `save`, else in `load`, is resumed: so the same command, given
       again, resumes wherever it began.
    2. The weights in `ref_load`, of either format, if it is given.
    3. Without it, a converted checkpoint in `load`, or else in `save`.
    4. Else the weights of `hf_checkpoint` itself.

    Raises:
        CheckpointError: there are no weights in `ref_load`, or none at all; a tracker that names
            no checkpoint; a `load` that is another folder than `save` and holds none, as one that
            is misspelt.
    """
    folders = [url for url in (save, load) if url]
    found = {url: find(url) for url in folders}
    for checkpoint in found.values():
        if checkpoint is not None and checkpoint.extra is not None:
            return checkpoint, True
    if load and found[load] is None and not storage.is_same(load, save):
        raise CheckpointError(
            f"--load {load}: no Megatron checkpoint there (no {TRACKER}). {ways_on(load)}. Correct "
            f"it, or leave --load out to begin from the weights of {ref_load or hf_checkpoint}"
        )
    if ref_load:
        return weights_in(ref_load, hf_checkpoint), False

    converted = found[load or save]
    if converted is not None:
        return converted, False
    if is_hugging_face(hf_checkpoint):
        return SavedCheckpoint(hf_checkpoint, 0, None, is_hugging_face=True), False
    raise CheckpointError(
        f"{hf_checkpoint}: no weights there (*.safetensors), and {save} holds no Megatron "
        f"checkpoint (no {TRACKER}): give a folder with the weights, or name one with --ref-load"
    )


def weights_in(ref_load: str, hf_checkpoint: str) -> SavedCheckpoint:
    """Return the weights of a folder of either format.

    Raises:
        CheckpointError: it holds none, or an adapter alone.
    """
    checkpoint = find(ref_load, weights_only=True)
    if checkpoint is not None:
        is_read = checkpoint.extra is not None
        if checkpoint.has_adapter if is_read else stores_adapter(checkpoint.url):
            raise CheckpointError(
                f"--ref-load {ref_load}: holds the adapter of a LoRA run, and no whole model. "
                f"{merging(ref_load, hf_checkpoint)}"
            )
        return checkpoint

    if is_hugging_face(ref_load):
        return SavedCheckpoint(ref_load, 0, None, is_hugging_face=True)
    if PEFT_CONFIG in storage.names(ref_load):
        raise CheckpointError(
            f"--ref-load {ref_load}: holds an adapter in PEFT's format, and no whole model. To train "
            f"it further, give it as --lora-adapter-path. {merging(ref_load, hf_checkpoint)}"
        )
    raise CheckpointError(
        f"{ref_load}: no Megatron checkpoint there (no {TRACKER}), nor a Hugging Face one "
        f"(config.json and *.safetensors). {_unnamed(ref_load)}{_remedy(ref_load, hf_checkpoint)}"
    )


def _unnamed(url: str) -> str:
    """Return a sentence on the checkpoints of a folder without a tracker; "" if it has none."""
    return f"{ways_on(url)}. " if iterations(url) else ""


def _remedy(ref_load: str, hf_checkpoint: str) -> str:
    """Return what to do about a `--ref-load` without weights."""
    if not is_hugging_face(hf_checkpoint):
        place = "no weights there either"
        if storage.is_same(ref_load, hf_checkpoint):
            place = "that is --hf-checkpoint itself"
        return (
            f"{hf_checkpoint}: {place}. Put the weights (*.safetensors) there, or name a folder "
            "that has them with --ref-load"
        )
    return (
        f"Leave --ref-load out to begin from the weights of {hf_checkpoint}, or convert them: "
        f"miles convert hf-to-megatron --hf-checkpoint {hf_checkpoint} --save {ref_load}"
    )


def is_hugging_face(url: str) -> bool:
    """Return whether a folder holds a configuration and weights in Hugging Face's format."""
    names = set(storage.names(url)) - {PEFT_WEIGHTS}
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


@dataclass(frozen=True)
class Removal:
    """The outcome of removing the old checkpoints of a folder."""

    removed: tuple[str, ...] = ()
    """their folders"""
    failure: str | None = None
    """why one of them is still there; None: none is"""


def remove_old(
    url: str, keep_last: int | None, keep_best: int | None, base: str | None = None
) -> Removal:
    """Remove the checkpoints of a folder that are neither among the newest nor among the best.

    The checkpoint that the tracker names is always kept.

    Args:
        url: the folder.
        keep_last: newest ones to keep; None: all, or with `keep_best` the newest alone.
        keep_best: ones with the lowest evaluation loss to keep beside them; None: none.
        base: the frozen weights of a LoRA run: kept, if they lie there, too.

    Returns:
        what was removed, and why the rest was not.

    Raises:
        LeaseError: another run has taken the folder over.
        MilesError: the folder cannot be listed, or its tracker not be read.
    """
    if keep_last is None and keep_best is None:
        return Removal()

    storage.require_held(url)
    _, newest = tracked(url) or ("", 0)
    # Those after the newest are of a run from which somebody went back: not ours to remove.
    own = [iteration for iteration in iterations(url) if iteration <= newest]
    folders = [storage.join(url, folder_name(iteration)) for iteration in own]
    if base is not None:
        folders = [folder for folder in folders if not storage.is_same(folder, base)]

    kept = set(folders[-(keep_last or 1) :])
    if keep_best:
        losses, unknown = _eval_losses(folders)
        kept.update(sorted(losses, key=lambda path: losses[path])[:keep_best])
        kept.update(unknown)  # it may be the best

    removed: list[str] = []
    failure = None
    for path in folders:
        if path in kept:
            continue
        try:
            storage.remove(path, max_tries=1)  # the training waits, and the next checkpoint tries
            removed.append(path)
        except WriteError as error:
            failure = failure or str(error)
    return Removal(tuple(removed), failure)


def _eval_losses(folders: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Return the evaluation loss of each checkpoint that has one, by its folder.

    Returns:
        also those whose `miles.json` cannot be read.
    """
    losses: dict[str, float] = {}
    unknown: list[str] = []
    for path in folders:
        try:
            loss = (read_extra(path) or {}).get("eval_loss")
        except BrokenFileError:
            unknown.append(path)
            continue
        if isinstance(loss, int | float):
            losses[path] = loss
    return losses, unknown


def remove_unfinished(url: str) -> list[str]:
    """Remove the folders of saves that never finished. The process holds the folder (`lease`).

    Returns:
        the names of those that are gone; none of a remote URL.
    """
    if not storage.is_local(url):
        return []
    storage.require_held(url)
    root = Path(storage.filesystem(url)[1])
    unfinished = sorted(root.glob(f"{SAVING}*"))
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in unfinished if not folder.exists()]
