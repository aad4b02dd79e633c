"""The cluster that a run is given."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast

import pytest

from miles.errors import CheckpointError
from miles.train.driver.cluster import require_shared_folder
from tests.support.disks import small_disk


class Nodes:
    """Looks for a file on the nodes, one of which may lack it; then a disk is mounted over it."""

    def __init__(self, stack: contextlib.ExitStack, lacking: list[str]) -> None:
        self.stack = stack
        self.lacking = lacking

    def nodes_without(self, path: str) -> list[str]:
        Path(path).unlink()
        self.stack.enter_context(small_disk(Path(path), "size=64k"))
        return self.lacking


def test_a_probe_that_cannot_be_removed_ends_nothing(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        require_shared_folder(str(tmp_path), cast(Any, Nodes(stack, [])))
    (tmp_path / ".shared").rmdir()
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(CheckpointError, match="is not the same folder on node-2: give one"),
    ):
        require_shared_folder(str(tmp_path), cast(Any, Nodes(stack, ["node-2"])))
