"""A terminal for a command of a test: what it wrote, when, and what its screen shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import LIMIT_SECONDS, PROJECT, environment

_STYLE = re.compile(r"\x1b\[[0-9;?]*[a-ln-zA-JL-Zhm]")
"""Colours and the cursor's looks: everything but the erasing of a line."""


@dataclass(frozen=True)
class Session:
    """A command that has ended, and what it wrote onto its terminal."""

    status: int
    written: tuple[tuple[float, str], ...]
    """seconds after the start, and the text that was written then"""

    @property
    def raw(self) -> str:
        return "".join(text for _, text in self.written)

    @property
    def screen(self) -> str:
        """What is seen in the end: lines that changed in place are as they were last."""
        lines = []
        for line in _STYLE.sub("", self.raw).replace("\r\n", "\n").split("\n"):
            shown = ""
            for piece in line.split("\r"):
                is_erased = "\x1b[K" in piece or "\x1b[2K" in piece
                text = piece.replace("\x1b[K", "").replace("\x1b[2K", "")
                shown = text if is_erased else text + shown[len(text) :]
            lines.append(shown.rstrip())
        return "\n".join(lines)

    def seconds_until(self, text: str) -> float:
        """Return how long it took until a text was written."""
        seen = ""
        for seconds, piece in self.written:
            seen += piece
            if text in seen:
                return seconds
        raise AssertionError(f"{text!r} is not in {self.raw!r}")


def in_terminal(
    words: list[str | Path], *, columns: int = 80, env: Mapping[str, str] | None = None
) -> Session:
    """Run a command in a terminal of its own.

    Args:
        words: the command; `miles` stands for the one of this project.
        env: beside this process's environment.
    """
    line = [str(word) for word in words]
    if line[0] == "miles":
        line = [sys.executable, "-m", "miles.cli", *line[1:]]
    variables = {
        **environment(),
        "TERM": "xterm-256color",
        "PYTHONPATH": str(PROJECT),
        **(env or {}),
    }
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        variables.pop(name, None)

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    begin = time.monotonic()
    process = subprocess.Popen(
        line,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=PROJECT,
        env=variables,
        start_new_session=True,
    )
    os.close(theirs)

    written = []
    while time.monotonic() < begin + LIMIT_SECONDS:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # Linux: nobody holds the other end any more
            break
        if not piece:
            break
        written.append((time.monotonic() - begin, piece.decode(errors="replace")))
    os.close(ours)
    return Session(process.wait(LIMIT_SECONDS), tuple(written))
