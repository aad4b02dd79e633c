"""docs/faults.md: what users see when a fault is injected, and what is lost.

Each test compares the line that the user reads, and what was lost, with the row of its fault. With
`MILES_WRITE_DOCS=1`, it writes the row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from tests.support.processes import PROJECT

PAGE = PROJECT / "docs/faults.md"
NOTHING = "nothing"
SINCE = "steps since the last complete checkpoint; they are trained again, the same"

SECTIONS: dict[str, tuple[str, ...]] = {
    "A part of the run is lost": (
        "driver killed (SIGKILL, out of memory, power)",
        "loader process killed",
        "trainer killed",
        "writer of a checkpoint killed",
        "feed killed",
        "trainer killed, `--max-restarts` used up",
        "driver killed, checkpoints on S3, another machine",
        "node lost, another is free",
        "node lost, none is free",
        "row that kills its loader each time",
        "Ray's GCS server killed, a Ray of the run's own",
    ),
    "Errors that another start would not mend": (
        "weights became NaN",
        "exception in a trainer",
        "exception in a stage of the stream",
        "no memory left in a trainer",
        "file that one node lacks",
        "engine that gives other ids than `tokenizers`",
    ),
    "What can be known before the start": (
        "no row can be used",
        "too large a share of a small set cannot be used",
        "no row to evaluate can be used",
        "warm-up not shorter than the run",
        "no checkpoint to begin with",
        "no GPU is large enough, in a dry run",
        "other data or order than the checkpoint's",
        "other model than the checkpoint's",
        "NaN in a weight of the checkpoint",
        "no `--lora-rank` over the checkpoints of a LoRA run",
        "`--lora-rank` over the checkpoints of a run that trains all weights",
        "other adapter than the checkpoint's",
        "adapter of a LoRA run as `--ref-load`",
        "other base than the one that a LoRA run began from",
        "folder below a file",
        "disk read-only before the start",
        "bucket mistyped",
        "package of a sink missing",
    ),
    "Ray": (
        "nobody answers at `--ray-address`",
        "another program at `--ray-address`",
        "the dashboard's URL as `--ray-address`",
        "wrong token for a cluster that asks for one",
        "path of Ray's folder too long for its sockets",
        "Ray's folder cannot be written",
        "no room for Ray's object store",
        "SIGTERM while Ray starts",
        "Ctrl-C while Ray starts",
    ),
    "Storage and disks": (
        "killed while a checkpoint is written",
        "config.json on a full disk",
        "disk full before a checkpoint",
        "disk full before a checkpoint, `--on-save-error continue`",
        "disk full while a checkpoint is written",
        "old checkpoint that cannot be removed",
        "row group corrupt",
        "file gone while the run reads it",
        "file changed since its rows were counted",
        "no credentials for a store",
        "hub that cannot be reached",
        "export onto a mount point",
        "disk full while `prepare` writes",
    ),
    "Metrics and those who watch": (
        "W&B's process dies",
        "W&B's server gone",
        "TensorBoard's disk full",
        "disk of the metrics full",
        "output piped into `head`, which ends",
        "output on a full disk",
    ),
    "Two runs in one folder, and folders without a tracker": (
        "second run on one `--save`",
        "run that was stopped for minutes, and replaced",
        "checkpoints, and no tracker",
        "checkpoints, and no tracker, in `--load`",
        "empty tracker",
        "tracker that names what is not there",
        "run whose checkpoints are gone",
        "metrics of a run, and nothing else of it",
        "mistyped `--load` beside `--ref-load`",
        "`--output-dir` of another run",
        "`prepare` onto other prepared rows",
        "second `prepare` onto one `--output`",
    ),
    "Files of a run that are broken": (
        "`miles.json` of the newest checkpoint cut off",
        "file of the newest checkpoint lost",
        "records of a run with lines that cannot be read, then the same command",
        "`metrics.jsonl` lost a block, then `miles report`",
        "`ledger.json` cut off, then `miles report`",
        "tokenizer of a run has moved, then `miles report`",
    ),
    "Paths and settings": (
        "relative paths, and `--ray-address`",
        "file with the name of a pattern, `rows[v2].jsonl`",
        "empty path, of a variable that is not set",
        "two files behind `--prompt-data`",
        "folder of test files alone",
        "URL with one slash",
        "flag without an effect beside the others",
        "flag given twice",
        "negation that is negated, in YAML",
    ),
    "Leaving": (
        "SIGTERM to the driver",
        "SIGTERM before the first step",
        "Ctrl-C",
        "Ctrl-C, and once more",
        "Ctrl-C before the first step",
        "terminal closed",
        "Ctrl-C during `miles prepare`",
        "`ray job stop`",
        "same command after the last step",
    ),
    "Hostile input": (
        "row of over 128 MiB",
        "chat template that does not end",
        "tokenizer that brings code",
        "tokenizer file of gigabytes",
        "tokenizer file that leads elsewhere",
        "config.json with absurd numbers",
    ),
}
"""Section of the page -> its faults."""

FAULTS = tuple(fault for faults in SECTIONS.values() for fault in faults)

HEAD = """# Faults

This page lists what you see when something breaks, and what it costs. Each row comes from a test
that injects the fault. If the run continues, the test compares the rest of it with a run without a
fault: its weights, losses and step fingerprints are the same, bit by bit. The texts are those that
the runs printed, with `N` for numbers and `…` for folders. [resume.md](resume.md) says what to type
then.

The rule: nothing that was trained is lost beyond the last complete checkpoint, and the steps that
follow are those that would have followed.

| exit status | of what |
|---|---|
| 0 | the run is finished, or was stopped and saved: the same command goes on |
| 1 | `miles convert verify` found a difference; or a mistake of our own, which we want to hear of |
| 2 | the launch line: a flag, or flags that do not agree |
| 3 | an input: a file, a row, a tokenizer, a checkpoint |
| 4 | the cluster: Ray, its nodes, a process that was lost too often |
| 5 | the run: it diverged, or a result could not be written |
| 130 | Ctrl-C that stopped at once: the second one, or one while no step was under way |

An error is one paragraph with the cause and what to do. `MILES_DEBUG=1`, or `--debug` before the
command, adds the traceback.
"""
_TABLE = "| fault | what is seen | what is lost |\n|---|---|---|\n"


def observed(fault: str, printed: str, marker: str, lost: str) -> None:
    """Compare a row of the page with what was seen; with `MILES_WRITE_DOCS`, write it there.

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
    row = f"| {fault} | {without_details(line)} | {lost} |"

    if os.environ.get("MILES_WRITE_DOCS"):
        PAGE.write_text(page(rows_of_page() | {fault: row}), encoding="utf-8")
    assert rows_of_page().get(fault) == row, "MILES_WRITE_DOCS=1 writes the row"


def without_details(line: str) -> str:
    """Return a line without what differs from run to run: folders, numbers, the machine's name."""
    # A quote or a bracket before a path stays: its other half stays, too.
    line = re.sub(r"[^\s('\"]*/\S*/(?=\S)", "…/", line.strip())
    line = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ +", "", line)  # of train.log
    line = re.sub(r"(died during )'\w+': .*", r"\1…", line)
    line = re.sub(r"(the data stream failed: \w+): .*(; step)", r"\1 …\2", line)
    # Which step it is varies.
    line = re.sub(r"between row .* and row .*", "between row N of … and row N of …", line)
    line = re.sub(r"(the data stream failed: )(?!.*; step).*", r"\1…", line)
    # A connection ends in one of two ways, whichever side notices first.
    line = re.sub(
        r"\((ConnectionResetError|BrokenPipeError): .*?\)", "(ConnectionResetError: …)", line
    )
    line = re.sub(r"on host [^\s,]+", "on host …", line)
    line = re.sub(r" of [^ ,]+, (?=\S+ MB are free)", " of …, ", line)
    line = re.sub(r"\d+(,\d{3})*(\.\d+)?", "N", line)
    # How many steps are under way when a signal comes varies.
    line = re.sub(r"N step since (\S+) is lost", r"N steps since \1 are lost", line)
    return line.replace("|", "\\|")[:420]


def rows_of_page() -> dict[str, str]:
    """Return fault -> its row, as they stand on the page."""
    shown = PAGE.read_text(encoding="utf-8").splitlines()
    rows = {}
    for fault in FAULTS:
        for line in shown:
            if line.startswith(f"| {fault} | "):
                rows[fault] = line
    return rows


def page(rows: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        rows: fault -> its row.
    """
    text = HEAD
    for title, faults in SECTIONS.items():
        lines = [rows[fault] for fault in faults if fault in rows]
        if lines:
            text += f"\n## {title}\n\n{_TABLE}" + "\n".join(lines) + "\n"
    return text
