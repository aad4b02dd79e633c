"""The files of a `torch_dist` checkpoint, and the checkpoints of a folder that have them all.

    SAVE/iter_0000020/metadata.json, .metadata, __0_0.distcp, __1_0.distcp    complete
    SAVE/iter_0000040/metadata.json, .metadata, __0_0.distcp                  incomplete: .metadata
                                                                              names __1_0.distcp, too

Every module that asks whether a checkpoint is complete asks here. No torch is needed: `.metadata`
is a pickle, in which the names of the files stand as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from miles.common import storage
from miles.common.checkpoint_tracker import folder_name
from miles.errors import SourceError

MARK = "metadata.json"
"""Tells that a folder is a `torch_dist` checkpoint."""
INDEX = ".metadata"
"""Names the file of each tensor."""
_ITERATION = re.compile(r"iter_(\d{7,})")
_PART = re.compile(rb"__\d+_\d+\.distcp")
_ADAPTER = b"decoder.layers.adapter."
"""Begins the keys of the tensors of an adapter (`miles.architecture.adapter`)."""
_NUM_SHOWN = 3


def missing_files(folder: str) -> list[str]:
    """Return the names of the files that a checkpoint lacks; none of a complete one.

    It costs one listing, and one reading of `.metadata`.

    Args:
        folder: of the checkpoint (fsspec URL). All files of one that is not there are missing.

    Raises:
        SourceError: the folder cannot be read.
    """
    names = set(storage.names(folder))
    needed = {MARK, INDEX}
    if needed <= names:
        found = _PART.findall(storage.read_bytes(storage.join(folder, INDEX)))
        needed.update(name.decode() for name in found)
    missing = sorted(needed - names)
    has_parts = any(name.endswith(".distcp") for name in names)
    return missing if has_parts or len(missing) > 0 else ["*.distcp"]


def stores_adapter(folder: str) -> bool:
    """Return whether a checkpoint has the tensors of an adapter, also without `miles.json`."""
    index = storage.join(folder, INDEX)
    return storage.exists(index) and _ADAPTER in storage.read_bytes(index)


def named_missing(missing: Sequence[str]) -> str:
    """Return a phrase on missing files: "__1_0.distcp, __2_0.distcp: no such file"."""
    more = f" and {len(missing) - _NUM_SHOWN} more" if len(missing) > _NUM_SHOWN else ""
    return f"{', '.join(missing[:_NUM_SHOWN])}{more}: no such file"


def is_complete(folder: str) -> bool:
    """Return whether a checkpoint has all its files; False where they cannot be read."""
    try:
        return not missing_files(folder)
    except SourceError:
        return False


def iterations(url: str) -> list[int]:
    """Return the iterations that have a folder, complete or not, the oldest first.

    Args:
        url: the folder of the checkpoints (fsspec URL); its tracker is not looked at.
    """
    found = []
    for name in storage.names(url):
        match = _ITERATION.fullmatch(name)
        if match and name == folder_name(int(match[1])):
            found.append(int(match[1]))
    return sorted(found)


def complete_iterations(url: str) -> list[int]:
    """Return the iterations of the complete checkpoints in a folder, the oldest first."""
    return [step for step in iterations(url) if is_complete(storage.join(url, folder_name(step)))]


def iteration_of(folder: str) -> int | None:
    """Return the iteration that a checkpoint's folder has in its name; None: it has none."""
    match = _ITERATION.fullmatch(folder.rstrip("/").rsplit("/", 1)[-1])
    return int(match[1]) if match else None
