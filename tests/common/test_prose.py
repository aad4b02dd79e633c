"""Sentences on a terminal are broken between words; elsewhere they are one line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from miles.common.prose import Prose

PATH = "/data/models/a-long-name-of-a-folder/and-another/rows.parquet"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(prose: Prose, screen: io.StringIO) -> list[str]:
    console = Console(
        file=screen, width=40, color_system=None, force_terminal=screen.isatty(), _environ={}
    )
    console.print(prose, soft_wrap=True)
    return screen.getvalue().splitlines()


def test_a_terminal_has_lines_of_whole_words() -> None:
    lines = printed(Prose("  the rows of a source are read once an epoch, in order"), Terminal())
    assert lines == ["  the rows of a source are read once an", "  epoch, in order"]


def test_a_path_stays_whole() -> None:
    assert printed(Prose(f"cannot read {PATH}: it is gone"), Terminal()) == [
        "cannot read",
        f"{PATH}:",
        "it is gone",
    ]


@pytest.mark.parametrize("text", ["one line " * 20, f"cannot read {PATH}\nit is gone"])
def test_a_pipe_has_the_text_as_it_is(text: str) -> None:
    assert printed(Prose(Text(text)), io.StringIO()) == text.splitlines()


def test_blank_lines_stay() -> None:
    assert printed(Prose("\nfirst\n\nlast"), Terminal()) == ["", "first", "", "last"]
