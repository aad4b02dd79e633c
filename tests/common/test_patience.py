"""A command says what it does while its first answer takes a while, and no word if it does not."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from miles.cli import main
from miles.common import patience
from miles.common.first_contact import announced
from miles.train.launch.arguments import LaunchLine, read_line
from miles.train.launch.notices import LOOKING

LONG = "miles: this takes a while: "


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every wait be a long one."""
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(patience, "LONG_SECONDS", 0.0)


def wait_for_the_speaker() -> None:
    """Wait until both lines have been said, or cannot be any more."""
    for thread in threading.enumerate():
        if thread.name == "miles-patience":
            thread.join()


def test_a_quick_answer_is_all_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with patience.until_answered("looking"):
        patience.doing("counting")
        patience.answered()
        wait_for_the_speaker()
    with patience.until_answered("looking"):
        pass
    wait_for_the_speaker()
    assert capsys.readouterr().err == ""


@pytest.fixture
def begins(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have every wait be a long one, from when this is set."""
    begins = threading.Event()
    speak = patience._Patience._speak

    def speak_later(speaker: patience._Patience) -> None:
        begins.wait()
        speak(speaker)

    monkeypatch.setattr(patience._Patience, "_speak", speak_later)
    return begins


@pytest.mark.usefixtures("at_once")
def test_a_long_wait_has_two_lines(
    begins: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    with patience.until_answered("looking"), patience.until_answered("another"):
        patience.doing("counting")
        begins.set()
        wait_for_the_speaker()
    assert capsys.readouterr().err == f"miles: looking\n{LONG}counting\n"


@pytest.mark.usefixtures("at_once")
def test_a_server_that_does_not_answer_has_a_line_of_its_own(
    begins: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    with patience.until_answered("looking"), announced("s3://bucket/rows"):
        begins.set()
        wait_for_the_speaker()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
def test_a_launch_line_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_slowly(words: Sequence[str], *, recipe: Sequence[str]) -> LaunchLine:
        wait_for_the_speaker()
        return read_line(words, recipe=recipe)

    monkeypatch.setattr("miles.train.launch.arguments.read_line", read_slowly)
    assert main(["train", "--save", str(tmp_path)]) == 2
    first, second, error = capsys.readouterr().err.splitlines()
    assert first == f"miles: {LOOKING}"
    assert second == f"{LONG}{LOOKING}"
    assert error.startswith("miles: error: ")
