"""Reading a run's folder: files that are missing or empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.errors import SourceError
from miles.report.run_data import (
    read_answers,
    read_attempts,
    read_first_batch,
    read_ledger,
    read_metrics,
    read_rejects,
    read_skipped_steps,
)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"metrics\.jsonl: no such file; expected the folder of a run"
    ):
        read_metrics(str(tmp_path))

    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SourceError, match="no step was trained yet"):
        read_metrics(str(tmp_path))


def test_other_files_may_be_missing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert read_first_batch(folder) is None
    assert read_ledger(folder) == {}
    assert read_rejects([folder]) == []
    for read in (read_answers, read_skipped_steps, read_attempts):
        assert read(folder) == []
