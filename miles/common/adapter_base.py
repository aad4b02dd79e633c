"""The frozen weights of a LoRA run that goes on: its checkpoints hold the adapter alone.

    SAVE/iter_0000100/    the adapter, its optimizer; miles.json has the base that it began beside
    --ref-load            the base, wherever it is now
    --hf-checkpoint       the base, without --ref-load

The ranks compare the base with what `miles.json` says of it (`miles.train.rank.base_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from miles.common import storage
from miles.common.checkpoint_folder import BASE, SavedCheckpoint, is_hugging_face, weights_in
from miles.errors import CheckpointError

_CHECKPOINT = re.compile(r"release|iter_\d{7,}")
"""The name of the folder of a `torch_dist` checkpoint."""


def find_base(
    checkpoint: SavedCheckpoint, load: str | None, ref_load: str | None, hf_checkpoint: str
) -> SavedCheckpoint:
    """Return the frozen weights beside the adapter of a checkpoint.

    1. Those in `ref_load`, of either format, if it is given.
    2. The ones that the run began from, if they lie in its own folder or in `load`: a converted
       checkpoint, which the tracker named then.
    3. Else the weights of `hf_checkpoint`.

    Args:
        checkpoint: with an adapter, of the run that goes on.

    Raises:
        CheckpointError: there are none.
    """
    if ref_load:
        return weights_in(ref_load, hf_checkpoint)

    began_from = base_url(checkpoint)
    own_folders = [url for url in (checkpoint.url.rstrip("/").rsplit("/", 1)[0], load) if url]
    if began_from is not None and _is_converted_in(began_from, own_folders):
        return SavedCheckpoint(began_from, 0, None)
    if is_hugging_face(hf_checkpoint):
        return SavedCheckpoint(hf_checkpoint, 0, None, is_hugging_face=True)
    raise CheckpointError(
        f"{hf_checkpoint}: no weights there (*.safetensors), and {checkpoint.url} holds an "
        f"adapter alone: name the weights that it began from with {ref_load_line(checkpoint)}"
    )


def base_url(checkpoint: SavedCheckpoint) -> str | None:
    """Return the folder of the weights that a LoRA run began from; None: it is not known."""
    base = (checkpoint.extra or {}).get(BASE)
    url = base.get("url") if isinstance(base, dict) else None
    return url if isinstance(url, str) else None


def ref_load_line(checkpoint: SavedCheckpoint) -> str:
    """Return the flag that names the weights that a LoRA run began from."""
    return f"--ref-load {folder_of(base_url(checkpoint) or 'DIR')}"


def folder_of(url: str) -> str:
    """Return the folder by which weights are named: that of the tracker, for a checkpoint."""
    parent, _, name = url.rstrip("/").rpartition("/")
    return parent if _CHECKPOINT.fullmatch(name) else url


def _is_converted_in(url: str, folders: Sequence[str]) -> bool:
    """Return whether a checkpoint is there, and lies in one of the folders."""
    is_inside = any(storage.is_within(url, folder) for folder in folders)
    return is_inside and storage.exists(storage.join(url, "metadata.json"))
