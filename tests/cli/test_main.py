"""The `miles` command: its commands, and what becomes of errors."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from miles import cli
from miles.cli import build_parser, main
from miles.errors import SourceError

COMMANDS = ("demo", "prepare", "certify", "convert", "train", "inspect", "report", "tiny-model")


def test_help_names_every_command() -> None:
    help_text = build_parser().format_help()
    for command in (*COMMANDS, "completion"):
        assert f"    {command}" in help_text


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miles.cli", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, cli.__version__)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: miles {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SourceError("a.jsonl: [row 3] is broken"), 1, "miles: error: a.jsonl: [row 3] is broken"),
        (OSError(errno.ENOSPC, "no space", "/full"), 1, "no space: '/full'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_one_line(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("miles.demo.run.run_demo", fail)
    assert main(["demo"]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == (1 if message else 0)


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EBADF, "a closed file")

    monkeypatch.setattr("miles.demo.run.run_demo", fail)
    with pytest.raises(OSError, match="a closed file"):
        main(["demo"])


def test_a_mistake_on_a_launch_line_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--save", str(tmp_path), "--num-epochs", "3"]) == 1
    printed = capsys.readouterr().err
    assert printed == "miles: error: there is no flag --num-epochs; did you mean --num-epoch?\n"
