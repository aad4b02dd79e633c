"""Counts reconcile at every step, nothing counts twice, and every reject is named once."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from miles.data.config import SourceConfig
from miles.data.ledger import Ledger
from miles.data.manifest import Manifest, build_manifest
from miles.data.types import Reject, StepReport
from miles.errors import CheckpointError, DataError

NUM_ROWS = {"a": 600, "b": 900}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    for name, num_rows in NUM_ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text('{"x": 1}\n' * num_rows)
    return build_manifest([SourceConfig(name, (str(tmp_path / f"{name}.jsonl"),)) for name in NUM_ROWS])


def report(index: int, source_rows: tuple[int, int], *rejects: Reject) -> StepReport:
    return StepReport(
        index=index,
        epoch=0.0,
        next_row=0,
        num_rows=sum(source_rows),
        num_samples=sum(source_rows) - len(rejects),
        num_tokens=0,
        num_trained_tokens=0,
        num_straddling_tokens=0,
        fingerprint="",
        pack_fill=1.0,
        dp_imbalance=1.0,
        source_rows=source_rows,
        source_trained_tokens=(0, 0),
        rejects=rejects,
    )


STEPS = [
    report(0, (10, 5), Reject(3, 0, "no_messages", "turn 1"), Reject(602, 1, "too_long", "")),
    report(1, (0, 15)),
    report(2, (5, 10), Reject(700, 1, "too_long", "9000 tokens")),
    report(3, (10, 5), Reject(3, 0, "no_messages", "turn 1")),  # the next epoch, the same row again
]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_counts_reconcile_at_every_commit(manifest: Manifest, tmp_path: Path) -> None:
    ledger = Ledger(manifest, str(tmp_path / "run/rejects.jsonl"), max_bad_fraction=1.0)
    read = 0
    for step in STEPS:
        ledger.commit(step)
        read += step.num_rows
        totals = ledger.totals()
        for counts in totals.values():
            assert counts["read"] == sum(n for key, n in counts.items() if key != "read")
        assert sum(counts["read"] for counts in totals.values()) == read == ledger.num_read
    assert totals == {
        "a": {"read": 25, "trained": 23, "no_messages": 2},
        "b": {"read": 35, "trained": 33, "too_long": 2},
    }
    assert ledger.num_rejected == 4
    assert lines(tmp_path / "run/rejects.jsonl") == ledger.rejects
    assert ledger.rejects == [
        {"source": "a", "file": str(tmp_path / "a.jsonl"), "row": 3, "reason": "no_messages", "detail": "turn 1"},
        {"source": "b", "file": str(tmp_path / "b.jsonl"), "row": 2, "reason": "too_long", "detail": ""},
        {"source": "b", "file": str(tmp_path / "b.jsonl"), "row": 100, "reason": "too_long", "detail": "9000 tokens"},
    ]


def test_a_step_counts_once(manifest: Manifest, tmp_path: Path) -> None:
    ledger = Ledger(manifest, str(tmp_path / "rejects.jsonl"), max_bad_fraction=1.0)
    for step in STEPS[:3]:
        ledger.commit(step)
        before = ledger.totals()
        for again in STEPS[: step.index + 1]:
            ledger.commit(again)
        assert ledger.totals() == before
    assert len(lines(tmp_path / "rejects.jsonl")) == 3


@pytest.mark.parametrize("remote", [False, True])
def test_resume_at_every_step(manifest: Manifest, tmp_path: Path, remote: bool) -> None:
    """Killed at any step, resumed from any checkpoint before it: the same totals and the same file at the end."""
    folder = "memory://ledger" if remote else str(tmp_path)

    def content(name: str) -> str:
        with fsspec.open(f"{folder}/{name}", "r") as stream:
            return stream.read()

    whole = Ledger(manifest, f"{folder}/whole.jsonl", 1.0)
    for step in STEPS:
        whole.commit(step)
    for saved in range(len(STEPS) + 1):
        for killed in range(saved, len(STEPS) + 1):
            name = f"{saved}-{killed}.jsonl"
            first, totals = Ledger(manifest, f"{folder}/{name}", 1.0), "{}"
            for step in STEPS[:killed]:
                if step.index == saved:
                    totals = json.dumps(first.totals())
                first.commit(step)
            if saved == killed:
                totals = json.dumps(first.totals())
            second = Ledger.from_totals(json.loads(totals), manifest, f"{folder}/{name}", 1.0, next_step=saved)
            for step in STEPS[saved:]:
                second.commit(step)
            assert second.totals() == whole.totals()
            assert content(name) == content("whole.jsonl")
    if remote:
        fsspec.filesystem("memory").rm("/ledger", recursive=True)


def test_half_a_line_is_dropped_and_a_new_run_begins_empty(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    ledger = Ledger(manifest, str(path), 1.0)
    ledger.commit(STEPS[0])
    whole = path.read_text()
    path.write_text(whole + '{"source": "a", "fi')
    Ledger.from_totals(ledger.totals(), manifest, str(path), 1.0, next_step=1)
    assert path.read_text() == whole
    Ledger(manifest, str(path), 1.0)
    assert path.read_text() == ""


def test_without_a_file(manifest: Manifest) -> None:
    ledger = Ledger(manifest, None, 1.0)
    ledger.commit(STEPS[0])
    assert [entry["row"] for entry in ledger.rejects] == [3, 2]


def test_too_many_rejects_end_the_run(manifest: Manifest, tmp_path: Path) -> None:
    path = str(tmp_path / "rejects.jsonl")
    bad = tuple(Reject(row, 0, "too_long", "") for row in range(11))
    ledger = Ledger(manifest, path, max_bad_fraction=0.01)
    ledger.commit(report(0, (500, 0), *bad))  # 2.2 %, but too early to say
    with pytest.raises(DataError, match=r"11 of the 500 rows read were dropped \(11 too_long\).*--max-bad-fraction"):
        ledger.judge()
    with pytest.raises(DataError, match="11 of the 1000 rows") as caught:
        ledger.commit(report(1, (0, 500)))
    assert path in str(caught.value)
    assert ledger.num_read == 1000
    exactly = Ledger(manifest, path, max_bad_fraction=0.01)
    exactly.commit(report(0, (500, 500), *bad[:10]))
    exactly.judge()


@pytest.mark.parametrize(
    "totals",
    [
        {"elsewhere": {"read": 1, "trained": 1}},
        {"a": {"read": 2, "trained": 1}},
        {"a": {"read": 2}},
    ],
)
def test_totals_that_cannot_be(manifest: Manifest, totals: dict[str, dict[str, int]]) -> None:
    with pytest.raises(CheckpointError, match="ledger totals"):
        Ledger.from_totals(totals, manifest, None, 1.0, next_step=1)
