"""The adapter that a LoRA run has saved: what `miles.json` says of it.

A checkpoint of a LoRA run holds A and B and their optimizer state, and no weight of the model. Its
`miles.json` has the shape of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.architecture.adapter import TARGETS, AdapterShape
from miles.common import adapter_base, checkpoint_folder, storage
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.errors import CheckpointError


def saved_adapter(checkpoint: str) -> AdapterShape | None:
    """Return the adapter of a checkpoint; None: it holds a model's weights.

    Args:
        checkpoint: its own folder (fsspec URL), `…/iter_0000100`.

    Raises:
        CheckpointError: `miles.json` says something else of an adapter.
        BrokenFileError: `miles.json` cannot be read.
    """
    return adapter_in(checkpoint_folder.read_extra(checkpoint) or {}, checkpoint)


def saved_base(checkpoint: str) -> str | None:
    """Return the Hugging Face folder of the weights beside the adapter of a checkpoint.

    Args:
        checkpoint: its own folder (fsspec URL).

    Returns:
        None: it is not known, or they were a Megatron checkpoint's.
    """
    extra = checkpoint_folder.read_extra(checkpoint)
    url = adapter_base.base_url(SavedCheckpoint(checkpoint, 0, extra))
    return url if url is not None and adapter_base.folder_of(url) == url else None


def adapter_in(extra: Mapping[str, Any], checkpoint: str) -> AdapterShape | None:
    """Return the adapter of a checkpoint by the content of its `miles.json`.

    Raises:
        CheckpointError: it says something else of an adapter.
    """
    content = extra.get(checkpoint_folder.ADAPTER)
    if content is None:
        return None
    try:
        adapter = AdapterShape.from_json(content)
        is_sound = adapter.rank > 0 and adapter.alpha > 0 and bool(adapter.targets)
        if is_sound and set(adapter.targets) <= set(TARGETS):
            return adapter
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    where = storage.join(checkpoint, checkpoint_folder.EXTRA)
    raise CheckpointError(
        f"{where}: {checkpoint_folder.ADAPTER} is not the shape of an adapter, as a run writes it. "
        f"{checkpoint_folder.other_ways(checkpoint)}"
    )
