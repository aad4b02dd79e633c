"""Which test files start Ray or Megatron, and how each half of the files is shared out to processes.

`part_of_files` has the longest join the emptier part, one after another; `SECONDS` says which take
long.
"""

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


SECONDS = {
    "architecture/test_families.py": 40,
    "convert/test_hf_to_megatron.py": 25,
    "convert/test_plain_megatron.py": 20,
    "convert/test_torch_dist.py": 20,
    "integration/test_chaos.py": 150,
    "integration/test_commands.py": 120,
    "integration/test_continue_with_rl.py": 40,
    "integration/test_disks.py": 210,
    "integration/test_evaluation.py": 35,
    "integration/test_faults.py": 60,
    "integration/test_feed.py": 30,
    "integration/test_lora.py": 55,
    "integration/test_nodes.py": 180,
    "integration/test_notebook.py": 60,
    "integration/test_object_storage.py": 150,
    "integration/test_order.py": 150,
    "integration/test_parity.py": 320,
    "integration/test_queue.py": 50,
    "integration/test_resume.py": 40,
    "integration/test_stranger.py": 70,
    "integration/test_survival.py": 350,
    "integration/test_train.py": 75,
    "report/test_page_in_browser.py": 50,
    "test_benchmarks.py": 300,
    "train/estimate/test_memory.py": 50,
    "train/rank/test_adapter_checkpoints.py": 25,
    "train/rank/test_cpu_offload.py": 25,
    "train/rank/test_grouped_experts.py": 20,
    "train/rank/test_spread_experts.py": 20,
}
"""Seconds of a processor, with all processes that they start, of the heavy files that take many.
They decide the balance of the parts only: round numbers do.
"""
USUAL_SECONDS = 5
"""Of a heavy file that is not among them."""

_OF_ONE_RUN = re.compile(r"^from tests\.support\.commands import .*\bWorkspace\b", re.MULTILINE)
"""The tests of a file that imports this are compared with the one unbroken run of the session."""


@cache
def part_of_files(part: int, num_parts: int, *, heavy: bool) -> frozenset[Path]:
    """Return one share of the heavy files, or of the others.

    What takes longest comes first, and each in turn joins the part that has least. The heavy files
    that are compared with one and the same run stay together, as each part would need its own. A
    larger light file usually takes longer.

    Args:
        part: from 1.
        num_parts: of that half of the files.
        heavy: which half.
    """
    files = sorted(file for file in TESTS.rglob("test_*.py") if is_heavy(file) == heavy)
    weights = {file: _heavy_seconds(file) if heavy else file.stat().st_size for file in files}
    together = {file for file in files if heavy and _OF_ONE_RUN.search(file.read_text("utf-8"))}
    units = [[file] for file in files if file not in together]
    units += [sorted(together)] if together else []

    def weight(unit: list[Path]) -> int:
        return sum(weights[file] for file in unit)

    shares: list[list[Path]] = [[] for _ in range(num_parts)]
    for unit in sorted(units, key=lambda unit: (-weight(unit), unit)):
        min(shares, key=weight).extend(unit)
    return frozenset(shares[part - 1])


def _heavy_seconds(file: Path) -> int:
    return SECONDS.get(file.relative_to(TESTS).as_posix(), USUAL_SECONDS)
