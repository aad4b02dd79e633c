"""What the benchmarks claim, as far as a ratio within one run can be held to it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

needs_trl = pytest.mark.skipif(
    find_spec("trl") is None, reason="the peer takes a chat template from the package trl"
)


def benchmark(name: str, *words: str | Path, limit: float) -> str:
    """Runs a benchmark; what it printed."""
    line = [sys.executable, PROJECT / "benchmarks" / name, *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sample(assets: Path) -> list[str | Path]:
    """The words that name the real rows."""
    return [
        "--source",
        assets / "data/openhermes_sample.parquet",
        "--tokenizer",
        assets / "qwen3-tokenizer",
    ]


@pytest.mark.slow
@needs_trl
def test_encoding_is_four_times_as_fast_as_transformers(assets: Path) -> None:
    printed = benchmark(
        "encode.py",
        *sample(assets),
        "--rounds",
        "3",
        "--max-rows",
        "4096",
        "--min-ratio",
        "4",
        limit=300,
    )
    assert "4,096 rows" in printed


STREAM = {
    "steady": [
        *("--rows", "98304", "--bare-rows", "32768", "--peer-rows", "2048"),
        *("--steady-rounds", "1", "--min-share", "0.5"),
    ],
    "slow": [
        "--rows",
        "24576",
        "--slow-steps",
        "100",
        "--slow-window",
        "4096",
        "--max-wait",
        "0.02",
    ],
    "resume": ["--rows", "65536", "--window-rows", "8192", "--rounds", "3"],
    "growth": ["--growth-rows", "16384", "--growth-window", "2048", "--rounds", "2"],
}
"""Sections at a size for a test. On a busy machine the first two may miss their own bars: here they get lower ones."""


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize("section", STREAM)
def test_the_stream_keeps_its_bars(assets: Path, section: str) -> None:
    printed = benchmark(
        "stream.py", *sample(assets), "--section", section, "--check", *STREAM[section], limit=500
    )
    assert "met" in printed
    assert "MISSED" not in printed


@pytest.mark.slow
def test_converting_is_a_third_as_fast_as_copying_and_holds_little_memory(tmp_path: Path) -> None:
    """Of a checkpoint of 2 GB, both ways; the files that come back are compared with the first ones."""
    limits = ["--min-ratio", "0.33", "--max-resident-gigabytes", "1.5"]
    printed = benchmark(
        "convert.py", "--gigabytes", "2", "--rounds", "5", "--folder", tmp_path, *limits, limit=400
    )
    assert "2.05 GB" in printed
