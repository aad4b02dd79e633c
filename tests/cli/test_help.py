"""`--help` on screens of any width: no flag in two pieces, no line beyond the edge."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from miles.cli.commands import build_parser
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
