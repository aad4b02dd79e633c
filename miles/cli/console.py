"""What the commands share: the screen that they print on, and the type of argparse's subparsers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers` returns."""


def open_console() -> Console:
    """Return the screen, which colours what a command marks and nothing else."""
    from rich.console import Console

    return Console(highlight=False)
