"""Which test files start Ray or Megatron: `make quick` leaves them out."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]

FOLDERS = {"integration", "rank", "gpu"}
"""Every test in a folder of this name is heavy."""

_USES = re.compile(
    r"^\s*(?:import|from)\s+(?:ray|megatron|tests\.support\.(?:ranks|scenarios|commands))\b"
    r"|pytest\.mark\.heavy|start_rank",
    re.MULTILINE,
)
"""What a file imports, or names, that starts Ray or Megatron."""


@cache
def is_heavy(path: Path) -> bool:
    """Return whether a file's tests start Ray or Megatron.

    A file is heavy where it lies in one of `FOLDERS`, imports what starts Ray or ranks, or marks
    itself (`pytestmark = pytest.mark.heavy`).
    """
    if path.name == "conftest.py":
        return False
    if FOLDERS.intersection(path.relative_to(TESTS).parts):
        return True
    return _USES.search(path.read_text(encoding="utf-8")) is not None
