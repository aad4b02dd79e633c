"""What the benchmarks claim, as far as a ratio within one run can be held to it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="the benchmark reads a chat template from the package trl")
def test_encoding_is_four_times_as_fast_as_transformers(assets: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks/encode.py"
    words = ["--source", assets / "data/openhermes_sample.parquet", "--tokenizer", assets / "qwen3-tokenizer"]
    limits = ["--rounds", "3", "--max-rows", "4096", "--min-ratio", "4"]
    done = subprocess.run(
        [sys.executable, script, *map(str, words), *limits], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4,096 rows" in done.stdout
