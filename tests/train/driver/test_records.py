"""Broken records of a run: named once, mended, and readable by all that reads them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from miles.common import json_lines, run_folder
from miles.train.driver.records import RECORDS, mend_records, open_run_log
from tests.support.fault_table import observed


@pytest.mark.parametrize("name", RECORDS)
def test_a_broken_record_is_mended(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'\xff\xfe\n[]\n{"version": 9}\n{"step": 1, "st')
    (sentence,) = mend_records(str(tmp_path))
    assert sentence.startswith(f"{path}: lines 1, 2, 3 cannot be read; the other 0 are kept")
    assert json_lines.read(str(path)) == []
    assert mend_records(str(tmp_path)) == []


def test_it_is_said_once(tmp_path: Path) -> None:
    (tmp_path / run_folder.RUN_LOG).write_bytes(b"2026  begun\n\xff\n")
    (tmp_path / run_folder.ATTEMPTS).write_text('{"start": 1, "reason": "new run"}\n{\n')
    screen = io.StringIO()
    with open_run_log(str(tmp_path), Console(file=screen, width=400)) as run_log:
        run_log.report("going on")
    printed = screen.getvalue().splitlines()
    assert [line.split()[-1].rpartition("/")[2] for line in printed[:2]] == [
        "train.log.broken",
        "starts.jsonl.broken",
    ]
    assert printed[2:] == ["  going on"]
    fault = "records of a run with lines that cannot be read, then the same command"
    observed(fault, screen.getvalue(), "starts.jsonl: line 2 cannot be read", "the line")
    log = (tmp_path / run_folder.RUN_LOG).read_text().splitlines()
    assert log[0] == "2026  begun"
    assert len(log) == 5


def test_an_id_that_is_none_gives_way_to_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / run_folder.WANDB_ID
    path.write_text("a1b2c3d4\n")
    assert mend_records(str(tmp_path)) == []
    for content in (b"", bytes(8), b"\xff", b"a b"):
        path.write_bytes(content)
        (sentence,) = mend_records(str(tmp_path))
        assert "not the id of a run at Weights & Biases" in sentence
        assert not path.exists()
