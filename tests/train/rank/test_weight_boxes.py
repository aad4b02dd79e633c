"""Folders that a rank cannot begin from, or write into; `test_families` reads and writes the others."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from miles.errors import CheckpointError
from miles.train.rank.weight_boxes import load_weights, write_weights
from tests.support.ranks import SHAPE

TRAINER = cast(Any, SimpleNamespace(shape=SHAPE, adapter=None, gather_weights=lambda: None))
"""These folders are looked at before the model."""


def test_a_folder_of_another_machine_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"hf is not on {socket.gethostname()}, where a rank"):
        load_weights(TRAINER, str(tmp_path / "hf"))


def test_an_export_without_files_is_a_failure(tmp_path: Path) -> None:
    part = write_weights(TRAINER, tmp_path)
    assert part.num_bytes == 0
    assert part.failure is not None
    assert "model.safetensors: no such file" in part.failure.reason
