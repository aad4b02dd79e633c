"""A process is told from others that have its number."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from miles.common import process_identity
from miles.common.process_identity import ProcessIdentity


def test_this_process_is_alive_and_others_are_not() -> None:
    mine = ProcessIdentity.of_this()
    assert mine.pid == os.getpid()
    assert mine.is_alive() is True
    assert replace(mine, start="1").is_alive() is False, "an earlier one with the same number"
    assert replace(mine, pid=1 << 30).is_alive() is False


def test_nothing_is_known_of_other_machines() -> None:
    mine = ProcessIdentity.of_this()
    assert mine.machine.startswith(f"{mine.host}/")
    for other in ("", "node-7/boot/pid:[1]", mine.machine.rpartition("/")[0]):
        assert replace(mine, machine=other).is_alive() is None


def test_hidden_processes_are_not_held_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc does not show the processes of other users."""
    mine = ProcessIdentity.of_this()
    monkeypatch.setattr(process_identity, "_facts_of", lambda pid: None)
    assert mine.is_alive() is None
    assert replace(mine, pid=1 << 30).is_alive() is False
