"""Old checkpoints that cannot be removed are reported once, and tried again."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from miles.common import write_guard
from miles.common.checkpoint_files import iterations
from miles.common.checkpoint_tracker import TRACKER, write_tracker
from miles.errors import LeaseError
from miles.train.driver.old_checkpoints import OldCheckpoints
from miles.train.driver.run_log import RunLog
from tests.support.checkpoints import write_checkpoint


def test_a_folder_that_cannot_be_looked_at(tmp_path: Path) -> None:
    screen = io.StringIO()
    log, save = str(tmp_path / "log"), tmp_path / "run"
    config = SimpleNamespace(save=str(save), keep_last=1, keep_best=None)
    old = OldCheckpoints(cast(Any, config), RunLog(log, Console(file=screen, width=400)))
    for iteration in (1, 2):
        write_checkpoint(save, iteration)

    for _ in range(2):  # it is said again after it has worked
        for _ in range(2):
            (save / TRACKER).write_text("?")
            old.remove()
        write_tracker(str(save), 2)
        old.remove()
    assert iterations(str(save)) == [2]
    assert screen.getvalue().count("expected an iteration or 'release', found '?'. Old check") == 2

    def refuse() -> None:
        raise LeaseError("taken over")

    with write_guard.guarding(str(save), refuse), pytest.raises(LeaseError):
        old.remove()
