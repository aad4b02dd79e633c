"""The `miles` command: its commands, and what becomes of errors."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from miles import __version__
from miles.cli import main
from miles.cli.commands import build_parser
from miles.common import storage
from miles.common.debugging import VARIABLE
from miles.errors import SourceError
from tests.support.processes import closed_pipe

COMMANDS = ("demo", "prepare", "certify", "convert", "train", "inspect", "report", "tiny-model")


def test_help_names_every_command() -> None:
    help_text = build_parser().format_help()
    for command in (*COMMANDS, "completion"):
        assert f"    {command}" in help_text


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miles.cli", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: miles {command}" in capsys.readouterr().out


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `miles demo` end with an exception."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("miles.demo.run.run_demo", fail)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SourceError("a.jsonl: [row 3] is broken"), 3, "miles: error: a.jsonl: [row 3] is broken"),
        (OSError(errno.ENOSPC, "", "/full"), 5, "/full: no space left on the disk. Make room"),
        (OSError(errno.EBADF, "closed", "/a"), 5, "/a: OSError: [Errno 9] closed: '/a'"),
        (FileNotFoundError(errno.ENOENT, "", "/gone"), 3, "miles: error: /gone: no such file"),
        (KeyboardInterrupt(), 130, "miles: Ctrl-C: the demo is stopped; the same command"),
    ],
)
def test_an_error_is_one_line(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(error, monkeypatch)
    assert main(["demo"]) == status
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_mistake_of_ours_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        storage.join(None, "a")  # type: ignore[arg-type]

    monkeypatch.setattr("miles.demo.run.run_demo", fail)
    assert main(["demo"]) == 1
    printed = capsys.readouterr().err
    assert "a mistake in miles, not in your input: AttributeError: " in printed
    assert "(miles/common/storage.py:" in printed
    assert "MILES_DEBUG=1" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("words", [["demo"], ["--debug", "demo"]])
def test_a_traceback_is_shown_when_asked_for(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "1" if words == ["demo"] else "0")
    fail_with(SourceError("a.jsonl: is broken"), monkeypatch)
    assert main(words) == 3
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)")
    assert printed.endswith("miles: error: a.jsonl: is broken\n")


def test_an_output_that_nobody_reads_ends_the_command_quietly() -> None:
    script = "import sys\nfrom miles.cli import main\nsys.exit(main(['completion', 'bash']))"
    command = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    command.stdout.close()
    _, printed = command.communicate(timeout=60)
    assert (command.returncode, printed) == (141, "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_reader_of_a_stream_is_gone(
    stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes nothing but its output ends quietly; an error that nobody reads stays one."""
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, stream, pipe)
        for words, status in (
            (["completion", "bash"], {"stdout": 141, "stderr": 0}),
            (["report", str(tmp_path / "none")], {"stdout": 3, "stderr": 3}),
            (["train", "--num-epochs", "3"], {"stdout": 2, "stderr": 2}),
        ):
            assert main(words) == status[stream]


class Interruption:
    """Ctrl-C while a module is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "miles.cli.commands":
            raise KeyboardInterrupt


def test_ctrl_c_while_the_command_is_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "miles.cli.commands")
    monkeypatch.setattr(sys, "meta_path", [Interruption(), *sys.meta_path])
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "miles: Ctrl-C: stopped\n"


def test_a_mistake_on_a_launch_line_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--save", str(tmp_path), "--num-epochs", "3"]) == 2
    printed = capsys.readouterr().err
    assert printed == (
        "miles: error: 2 mistakes: (1) there is no flag --num-epochs; did you mean --num-epoch? "
        "(2) --hf-checkpoint and --prompt-data are missing\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--wandb-key", "hunter2"], "there is no flag --wandb-key here"),
        (["demo", "--wandb-key=hunter2"], "there is no flag --wandb-key here"),
        (["demo", "--wandb-key hunter2"], "there is no flag --wandb-key here"),
        (["demo", "-wandb-key=hunter2"], "of the line, belongs to no flag"),
        (["report", "run", "--wandb-key", "--hunter2"], "there is no flag --wandb-key here"),
        (["report", "run", "hunter2"], "of the line, belongs to no flag"),
        (["--wandb-key", "hunter2", "train"], "invalid choice (choose from "),
        (["demo", "--help=hunter2"], "-h/--help: it takes no value; see"),
        (["prepare", "a", "--output", "o", "--tokenizer", "t", "--t=hunter2"], "no flag --t here"),
    ],
)
def test_a_misplaced_key_is_not_quoted(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "hunter2" not in printed


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--wandb-key hunter2", "--wandb-key is joined to other text"),
        ("--wandb-key=hunter2", "--wandb-key says nothing about a conversion"),
    ],
)
def test_a_key_on_a_line_of_the_converter_is_not_quoted(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "hf-to-megatron", word]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "hunter2" not in printed


@pytest.mark.parametrize("size", ["9" * 400, "0", "5XB", "five"])
def test_a_size_that_is_none_is_named(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["convert", "megatron-to-hf", "--load", "a", "--hf-checkpoint", "b", "--save", "c"]
    assert main([*line, "--max-shard-size", size]) == 2
    assert "a size was expected, such as 5GB or 512MiB" in capsys.readouterr().err


def test_no_command_takes_an_abbreviation(capsys: pytest.CaptureFixture[str]) -> None:
    """`--token` was `--tokenizer`, and would be another flag when one of that name comes."""
    assert main(["prepare", "chat", "--output", "o", "--tokenizer", "t", "--max-bad", "0.5"]) == 2
    assert "there is no flag --max-bad here" in capsys.readouterr().err
    for words in (["certify", "t", "--loss-mask", "last"], ["convert", "verify", "a", "b", "--h"]):
        assert main(words) == 2
