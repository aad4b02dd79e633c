"""Folders that are checkpoints for all but Megatron: the files are there, and hold no tensor."""

from __future__ import annotations

from collections.abc import Mapping

from miles.common import storage
from miles.common.checkpoint_files import INDEX, MARK
from miles.common.checkpoint_tracker import folder_name

SMALLEST: Mapping[str, bytes] = {
    MARK: b"{}",
    INDEX: b"\x80\x04\x8c\x0c__0_0.distcp\x94\x8c\x0c__1_0.distcp\x94\x86.",
    "__0_0.distcp": b"",
    "__1_0.distcp": b"",
}
"""The files of a complete checkpoint: the smallest that two ranks have written."""


def write_checkpoint(save: object, name: int | str, extra: str = "") -> str:
    """Write the smallest complete checkpoint of a folder; return its own folder.

    Args:
        save: the folder, a path or an fsspec URL; no tracker is written.
        name: the iteration, or the folder's name.
        extra: content of its `miles.json`; "": it has none.
    """
    folder = storage.join(str(save), folder_name(name) if isinstance(name, int) else name)
    files = {**SMALLEST, "miles.json": extra.encode()} if extra else SMALLEST
    for file, content in files.items():
        storage.write_bytes(storage.join(folder, file), content)
    return folder
