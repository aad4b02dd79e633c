"""A guard for the one pickle that a `torch_dist` checkpoint needs: `.metadata`.

`torch.distributed.checkpoint` unpickles it without limits, so a checkpoint from a stranger could
run any command. Here it is unpickled first, and only the records that torch itself writes are
allowed. (Megatron reads `common.pt` with `weights_only`, which is torch's own guard.)
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from miles.errors import CheckpointError

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A name with a dot would lead from a module that is allowed into one that it imports.
        is_kind = module == "torch" and isinstance(
            getattr(torch, name, None), (torch.dtype, torch.memory_format)
        )
        is_record = module in _MODULES and "." not in name and _is_defined_in(module, name)
        if not (is_kind or is_record or (module, name) in _NAMES):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _is_defined_in(module: str, name: str) -> bool:
    attribute = getattr(importlib.import_module(module), name, None)
    return isinstance(attribute, type) and attribute.__module__ == module


def require_plain(folder: Path, url: str) -> None:
    """Refuse a checkpoint whose `.metadata` holds anything but the records of one.

    Args:
        folder: local, of one iteration.
        url: names it in errors.

    Raises:
        CheckpointError: names what it holds; or the file is missing or broken.
    """
    try:
        content = (folder / ".metadata").read_bytes()
        metadata = _Unpickler(io.BytesIO(content)).load()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{url}: no .metadata there: not a complete torch_dist checkpoint"
        ) from error
    except Exception as error:  # a broken pickle raises whatever it likes
        raise CheckpointError(f"{url}/.metadata: refused: {error}") from error
    _require_own_files(folder, url, metadata)


def _require_own_files(folder: Path, url: str, metadata: Any) -> None:
    """Refuse places in other folders, and pipes, at which a reader would wait for ever."""
    places = getattr(metadata, "storage_data", None)
    if not isinstance(places, dict):
        return
    names = {
        getattr(place, "relative_path", None): getattr(index, "fqn", "")
        for index, place in places.items()
    }
    for name, tensor in names.items():
        where = f"{url}: tensor {tensor}: {name}"
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{where} leads out of the folder: refused")
        path = folder / name
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{where} is no ordinary file: refused")
