"""A launch line that runs: what is missing from it is what a test adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import write_model


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    write_model(tmp_path)
    return ["--hf-checkpoint", str(tmp_path), "--prompt-data", "rows.parquet", "--save", "run"]
