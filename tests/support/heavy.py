"""Which test files start Ray or Megatron, and how the others are shared out to two processes."""

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


@cache
def part_of_light_files(part: int, num_parts: int) -> frozenset[Path]:
    """Return the share of the files that start neither Ray nor Megatron.

    A larger file usually takes longer: each in turn, the largest first, joins the part that has least.

    Args:
        part: from 1.
    """
    files = [file for file in TESTS.rglob("test_*.py") if not is_heavy(file)]
    sizes = {file: file.stat().st_size for file in files}
    shares: list[list[Path]] = [[] for _ in range(num_parts)]
    for file in sorted(files, key=lambda file: (-sizes[file], file)):
        min(shares, key=lambda share: sum(sizes[file] for file in share)).append(file)
    return frozenset(shares[part - 1])
