"""`--help` on screens of any width: no flag in two pieces, no line beyond the edge."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from miles.cli.commands import build_parser
from miles.common.help_lines import EXAMPLE, HelpLines
from miles.train.launch.parser import build_parser as build_launch_parser


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_fits_the_screen(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for parser in (*parsers(build_parser()), build_launch_parser()):
        lines = parser.format_help().splitlines()
        for line in lines:
            assert not re.search(r"\w-$", line), f"{parser.prog}: {line}"
            is_one_word = " " not in line.strip()
            is_flag = line.strip().startswith(("-", "[-"))
            assert len(line) <= columns or is_one_word or is_flag, f"{parser.prog}: {line}"
        assert columns < 80 or max(map(len, lines)) <= columns


def examples() -> Iterator[str]:
    """Yield each example of a help, as it stands on a narrow screen."""
    for parser in (*parsers(build_parser()), build_launch_parser()):
        lines = HelpLines(parser.prog, width=40)._fill_text(parser.epilog or "", 40, "").split("\n")
        yield from "\n".join(lines).replace(" \\\n", "").split("\n")


@pytest.mark.parametrize("line", [line for line in examples() if line.startswith(EXAMPLE)])
def test_an_example_can_be_pasted(line: str) -> None:
    words = shlex.split(line)[1:]
    if "--help" in words:
        words.remove("--help")
        assert words[0] in build_parser().format_help()
        return
    if words[0] == "train":
        build_launch_parser().parse_args(words[1:])
    build_parser().parse_args(words)


def test_each_command_has_a_sentence_and_examples() -> None:
    for parser in parsers(build_parser()):
        assert (parser.description or "").endswith("."), parser.prog
        assert f"{EXAMPLE}{parser.prog.removeprefix('miles').strip()}" in (parser.epilog or "")


def test_each_argument_says_what_it_is() -> None:
    for parser in parsers(build_parser()):
        for action in parser._actions:
            is_commands = isinstance(action, argparse._SubParsersAction)
            assert action.help or is_commands, f"{parser.prog}: {action.option_strings}"


def test_commands_stand_beside_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = build_parser().format_help()
    assert "\n    tiny-model  a tiny Qwen3 with random weights" in text
    assert "\n    demo        the main job" in text


def test_the_usage_of_a_run_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, second, *_ = build_launch_parser().format_help().splitlines()
    assert first.startswith("usage: miles train --hf") or first.endswith("--prompt-data PATH")
    assert second == "       --save DIR [flag ...]"
