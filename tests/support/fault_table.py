"""docs/faults.md: what the tests of this session saw when they injected a fault.

Each test enters the line that the user reads and what was lost. `MILES_WRITE_DOCS=1 pytest
tests/integration` writes the page; without it, the page must be what was seen.
"""

from __future__ import annotations

import re

from tests.support.processes import PROJECT

PAGE = PROJECT / "docs/faults.md"
NOTHING = "nothing"
SINCE = "steps since the last complete checkpoint; they are trained again, the same"

SEEN: dict[str, tuple[str, str]] = {}
"""Fault -> what the user sees, what is lost."""

FAULTS = (
    "driver killed (SIGKILL, out of memory, power)",
    "loader process killed",
    "trainer killed",
    "feed killed",
    "trainer killed, `--max-restarts` used up",
    "SIGTERM to the driver",
    "SIGTERM before the first step",
    "`ray job stop`",
    "killed while a checkpoint is written",
    "disk full before a checkpoint",
    "disk full before a checkpoint, `--on-save-error continue`",
    "disk full while a checkpoint is written",
    "driver killed, checkpoints on S3, another machine",
    "node lost, another is free",
    "node lost, none is free",
    "same command after the last step",
    "other data or order than the checkpoint's",
    "other model than the checkpoint's",
    "row that kills its loader each time",
    "row group corrupt",
    "file gone while the run reads it",
    "file changed since its rows were counted",
)

HEAD = """# Faults

This page lists what you see when something breaks, and what it costs. Each row comes from a test
that injects the fault into a real run and compares the rest of the run with one without a fault: if
it continues, its weights, losses and step fingerprints are the same, bit by bit. The texts are
those that the runs printed, with `N` for numbers and `…` for folders. [resume.md](resume.md) says
what to type then.

The rule: nothing that was trained is lost beyond the last complete checkpoint, and the steps that
follow are those that would have followed.

| fault | what is seen | what is lost |
|---|---|---|
"""


def observed(fault: str, printed: str, marker: str, lost: str) -> None:
    """Enters a row.

    Args:
        printed: what the run printed, or its error.
        marker: of the line that the user is to read; empty: nothing is said.
        lost: what the test has measured.
    """
    assert fault in FAULTS, fault
    line = next(line for line in printed.splitlines() if marker in line) if marker else "nothing"
    SEEN[fault] = (plain(line), lost)


def plain(line: str) -> str:
    """A line without what differs from run to run."""
    line = re.sub(r"\S*/\S*/(?=\S)", "…/", line.strip())
    line = re.sub(r"(died during )'\w+': .*", r"\1…", line)
    line = re.sub(r"(the data stream failed: \w+): .*(; step)", r"\1 …\2", line)
    line = re.sub(
        r"between row .* and row .*", "between row N of … and row N of …", line
    )  # of which step, varies
    line = re.sub(r"(the data stream failed: )(?!.*; step).*", r"\1…", line)
    line = re.sub(r" of [^ ,]+, (?=\S+ MB are free)", " of …, ", line)  # the machine
    line = re.sub(r"\d+(,\d{3})*(\.\d+)?", "N", line)
    return line.replace("|", "\\|")[:420]


def page() -> str:
    return HEAD + "".join(
        f"| {fault} | {SEEN[fault][0]} | {SEEN[fault][1]} |\n" for fault in FAULTS
    )
