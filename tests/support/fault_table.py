"""docs/faults.md: what users see when a fault is injected, and what is lost.

Each test enters the line that the user reads and what was lost. With `MILES_WRITE_DOCS=1`, pytest
writes the rows of the tests that ran; without it, the whole page must be what was seen.
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
    """Enter a row of the page.

    Args:
        fault: of `FAULTS`.
        printed: the output of the run, or its error.
        marker: a part of the line that the user is to read; empty where nothing is printed.
        lost: what the test has measured.
    """
    assert fault in FAULTS, fault
    line = "nothing"
    if marker:
        line = next(line for line in printed.splitlines() if marker in line)
    SEEN[fault] = (without_details(line), lost)


def without_details(line: str) -> str:
    """Return a line without what differs from run to run: folders, numbers, the machine's name."""
    line = re.sub(r"\S*/\S*/(?=\S)", "…/", line.strip())
    line = re.sub(r"(died during )'\w+': .*", r"\1…", line)
    line = re.sub(r"(the data stream failed: \w+): .*(; step)", r"\1 …\2", line)
    # Which step it is varies.
    line = re.sub(r"between row .* and row .*", "between row N of … and row N of …", line)
    line = re.sub(r"(the data stream failed: )(?!.*; step).*", r"\1…", line)
    line = re.sub(r" of [^ ,]+, (?=\S+ MB are free)", " of …, ", line)
    line = re.sub(r"\d+(,\d{3})*(\.\d+)?", "N", line)
    return line.replace("|", "\\|")[:420]


def page() -> str:
    """Return the page: the rows of this session, and those that it has for other faults."""
    shown = PAGE.read_text(encoding="utf-8").splitlines()
    rows = []
    for fault in FAULTS:
        kept = [line for line in shown if line.startswith(f"| {fault} | ")]
        if fault in SEEN:
            rows.append(f"| {fault} | {SEEN[fault][0]} | {SEEN[fault][1]} |")
        else:
            rows += kept
    return HEAD + "\n".join(rows) + "\n"
