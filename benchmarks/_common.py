"""The common parts of the benchmarks: real rows, the peer's chat template, and bars.

times transformers       10.4, bar: at least 10, met
first step at 90 %       1.62, bar: at most 1.5, MISSED
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

ASSETS = Path(
    os.environ.get("MILES_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets")
)


@dataclass(frozen=True)
class Bar:
    """A bound that a measured number is held to."""

    name: str
    measured: float
    limit: float
    is_lower: bool = False
    """whether the limit is the least, not the most"""

    @property
    def is_met(self) -> bool:
        if self.is_lower:
            return self.measured >= self.limit
        return self.measured <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.is_lower else "at most"
        verdict = "met" if self.is_met else "MISSED"
        return f"{self.measured:.3g}, bar: {sign} {self.limit:g}, {verdict}"


def print_bars(bars: Sequence[Bar], console: Console) -> None:
    """Print each bar with its measured number, as met or missed."""
    table = Table(show_header=False)
    for bar in bars:
        table.add_row(bar.name, str(bar))
    console.print(table)


def exit_where_missed(bars: Sequence[Bar]) -> None:
    """End the process with status 1 where a bar is missed."""
    missed = [bar.name for bar in bars if not bar.is_met]
    if missed:
        sys.exit(f"missed: {'; '.join(missed)}")


def add_sample_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name real rows and a real tokenizer."""
    parser.add_argument("--source", default=str(ASSETS / "data/openhermes_sample.parquet"))
    parser.add_argument("--tokenizer", default=str(ASSETS / "qwen3-tokenizer"))


def add_check_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that makes a missed bar a failure."""
    parser.add_argument("--check", action="store_true", help="exit status 1 where a bar is missed")


def training_template() -> str:
    """Return trl's chat template for Qwen3, which marks what is trained.

    The package is looked up, not imported: nothing else of it is needed.
    """
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        sys.exit("the peer takes a chat template from the package trl: pip install --no-deps trl")
    template = Path(spec.origin).parent / "chat_templates" / "qwen3_training.jinja"
    return template.read_text(encoding="utf-8")
