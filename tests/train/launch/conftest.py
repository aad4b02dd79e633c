"""A launch line that runs: what is missing from it is what a test adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import QWEN3


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return ["--hf-checkpoint", str(tmp_path), "--prompt-data", "rows.parquet", "--save", "run"]
