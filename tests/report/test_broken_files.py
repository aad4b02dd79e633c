"""A report shows what there is, and says what is missing, whatever file of the run is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.cli import main
from miles.common import run_folder
from miles.errors import BrokenFileError, SourceError, TemplateError
from miles.report import html_page, report
from miles.report.report import write_report
from miles.report.run_data import read_first_batch, read_ledger
from tests.support.fault_table import NOTHING, observed
from tests.support.metrics_lines import PLAIN_RUN, write_lines

RECORDS = (
    run_folder.REJECTS,
    run_folder.ATTEMPTS,
    run_folder.SKIPPED_STEPS,
    run_folder.EVAL_SAMPLES,
)
NO_OBJECT = (b"", b'{"chat": {"rows"', b"\xff\xfe", b"[]", b'{"chat": {"rows": 1}}')

SEGMENT = {"source": "chat", "file": "chat.jsonl", "row": 3}
SAMPLE = {**SEGMENT, "input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of four steps."""
    write_lines(tmp_path / run_folder.METRICS, PLAIN_RUN)
    return tmp_path


def first_batch_of(folder: Path, tokenizer: str) -> None:
    content = {"tokenizer": tokenizer, "micro_batches": [[SAMPLE]]}
    (folder / run_folder.FIRST_BATCH).write_text(json.dumps(content))


def report_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Write the report by command; return the page and what was printed."""
    assert main(["report", str(folder)]) == 0
    page = (folder / run_folder.REPORT).read_text()
    assert "<b>2.000</b><span>loss, first step</span>" in page, "what there is is shown"
    return page, capsys.readouterr().out


@pytest.mark.parametrize("content", NO_OBJECT)
def test_a_broken_object_is_named(folder: Path, content: bytes) -> None:
    readers = {run_folder.LEDGER: read_ledger, run_folder.FIRST_BATCH: read_first_batch}
    for name, read in readers.items():
        (folder / name).write_bytes(content)
        with pytest.raises(BrokenFileError, match=f"{folder / name}: "):
            read(str(folder))


@pytest.mark.usefixtures("undrawn")
def test_what_is_broken_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RECORDS:
        (folder / name).write_bytes(b'\xff\n{"step"\n[]\n{"version": 9}\n{"step": 1')
    for name in (run_folder.LEDGER, run_folder.FIRST_BATCH):
        (folder / name).write_bytes(NO_OBJECT[1])
    page, printed = report_of(folder, capsys)

    assert "What this page does not show" in page
    assert page.count("<li class") == 2 * len(RECORDS) + 2
    for name in RECORDS:
        sentence = f"{folder / name}: lines 1, 2, 3, 4 cannot be read, and not shown here."
        assert sentence in page
        assert f"  {sentence}\n" in printed
        assert f"  {folder / name}: its last line was cut off, and is not shown here.\n" in printed
    fault = "`ledger.json` cut off, then `miles report`"
    observed(fault, printed, run_folder.LEDGER, NOTHING)


def test_inspect_says_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / run_folder.FIRST_BATCH).write_bytes(NO_OBJECT[1])
    assert main(["inspect", str(folder)]) == SourceError.exit_status
    error = capsys.readouterr().err
    assert "first_batch.json: cut off behind line 1. Nothing but miles inspect" in error
    assert "The first step of a new run writes another" in error


@pytest.mark.usefixtures("undrawn")
def test_metrics_are_shown_as_far_as_they_go(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (folder / run_folder.METRICS).read_bytes().splitlines(keepends=True)
    lines[1] = bytes(len(lines[1]) - 1) + b"\n"  # a disk that lost a block
    (folder / run_folder.METRICS).write_bytes(b"".join(lines) + b'{"step": 9')
    page, printed = report_of(folder, capsys)
    assert "3 steps, " in page
    marker = "metrics.jsonl: line 2 cannot be read"
    observed("`metrics.jsonl` lost a block, then `miles report`", printed, marker, "the line")

    (folder / run_folder.METRICS).write_bytes(b"\xff\n")
    assert main(["report", str(folder)]) == SourceError.exit_status
    assert "metrics.jsonl: no line of it can be read" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_tokenizer_that_has_moved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first_batch_of(folder, str(folder / "gone"))
    page, printed = report_of(folder, capsys)
    counts = "1 sample, the longest of 3 tokens, 2 of them trained (row 3 of chat.jsonl)"
    assert counts in page
    observed("tokenizer of a run has moved, then `miles report`", printed, counts, NOTHING)

    assert main(["inspect", str(folder)]) == TemplateError.exit_status
    error = capsys.readouterr().err
    assert counts in error
    assert f"{folder}/gone: no such folder" in error


def test_a_page_without_charts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(figure: object) -> bytes:
        raise ImportError("no module named 'matplotlib'")

    for module in (html_page, report):
        monkeypatch.setattr(module, "to_png", no_library)
    page, _ = report_of(folder, capsys)
    assert "<img" not in page
    assert "The charts cannot be shown (ImportError: no module named " in page
    assert not (folder / run_folder.LOSS_CHART).exists()


def test_another_version_has_other_keys(folder: Path) -> None:
    lines = [{"step": step, "sft/loss": 2.0, "sft/epoch": 0.5} for step in range(3)]
    write_lines(folder / run_folder.METRICS, lines)
    (folder / run_folder.LEDGER).write_text(json.dumps([1]))
    page = Path(write_report(str(folder))[0]).read_text()
    assert "3 steps, 0.50 epochs" in page
    assert "<b>2.000</b><span>loss, last step</span>" in page
    assert "tokens per second</span>" not in page
    assert "Is the loader the bottleneck?" not in page
