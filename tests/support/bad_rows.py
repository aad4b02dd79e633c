"""Runs over files with broken rows, and what each row came to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
)
from miles.data.files.manifest import build_manifest
from miles.data.stream import stages
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.types import StepReport

SECRET = "zebra"
"""In each broken row. No list of rejects may hold it."""
SECRET_TEXT = SECRET + " crossing " + SECRET * 40
MAX_TOKENS = 512


def chat(answer: Any, question: Any = "2+2?", **further: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **further,
    }


def line(row: Any) -> bytes:
    return json.dumps(row).encode()


GOOD = line(chat("4"))


@dataclass(frozen=True)
class Outcome:
    """The result of a run over some files."""

    ledger: Ledger
    reports: list[StepReport]
    trained: list[int]
    """ids of the rows trained, sorted"""
    text: str
    """of rejects.jsonl"""

    @property
    def rejects(self) -> list[tuple[str, int, str]]:
        """(file's name, row, reason)"""
        entries = [json.loads(line) for line in self.text.splitlines()]
        assert all(set(entry) == {"source", "file", "row", "reason", "detail"} for entry in entries)
        return [(Path(entry["file"]).name, entry["row"], entry["reason"]) for entry in entries]

    @property
    def dropped(self) -> list[tuple[int, str]]:
        """(row, reason), of one file"""
        return [(row, reason) for _, row, reason in self.rejects]


def config_of(
    files: Sequence[Path], tokenizer: Path, form: RowFormat | None = None, **encode: Any
) -> DataConfig:
    sources = [
        SourceConfig(file.name.split(".")[0], (str(file),), form or RowFormat()) for file in files
    ]
    return DataConfig(
        sources=tuple(sources),
        order=OrderConfig(batch_size=3),
        encode=EncodeConfig(str(tokenizer), max_sample_tokens=MAX_TOKENS, **encode),
        pack=PackConfig(dp_size=2, max_tokens_per_gpu=2 * MAX_TOKENS),
    )


def run(config: DataConfig, folder: Path) -> Outcome:
    """Take every row once, as a run does, and check what must hold for any rows."""
    manifest = build_manifest(config.sources)
    path = folder / "run" / "rejects.jsonl"
    limits = RejectLimits(1.0, fatal_reasons=RejectLimits.of(config).fatal_reasons)
    ledger = Ledger(manifest, str(path), limits)
    reports: list[StepReport] = []
    trained: list[int] = []
    for step in stages.local_steps(manifest, config):
        ledger.commit(step.index, step.report.rows)
        reports.append(step.report)
        for micro_batch in chain(*step.micro_batches):
            trained += [row for row in micro_batch.row_ids.tolist() if row >= 0]

    totals = ledger.totals()
    for counts in totals.values():
        outcomes = [n for key, n in counts.items() if key not in ("read", "truncated")]
        assert counts["read"] == sum(outcomes)
    assert sum(counts["read"] for counts in totals.values()) == manifest.num_rows

    dropped: list[int] = []
    for report in reports:
        dropped += [reject.row_id for reject in report.rows.rejects]
    assert sorted(trained + dropped) == list(range(manifest.num_rows))
    assert SECRET not in path.read_text()
    return Outcome(ledger, reports, sorted(trained), path.read_text())


def run_lines(
    lines: Sequence[bytes], folder: Path, tokenizer: Path, form: RowFormat | None = None
) -> Outcome:
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    return run(config_of([file], tokenizer, form), folder)
