"""A long call says what it does: on a terminal, and nowhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
import types

import pytest

from miles.common import progress as progress_module
from miles.common.progress import Bar, note, progress, to_html
from tests.support.processes import PROJECT, wait_until

SCRIPT = """
import time
from miles.common.progress import progress
with progress("looking at the files"):
    time.sleep(0.6)
    with progress("reading rows", total=20_000, total_bytes=9_000_000) as bar:
        for _ in range(12):
            bar.advance(1_000)
            bar.note("5,000 tokens")
            time.sleep(0.1)
print("the result")
"""
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_facts_stand_in_their_order() -> None:
    bar = Bar("reading rows", total=400, total_bytes=8_000_000)
    assert bar.facts(0.0) == ["0 of 400 rows"]
    bar.advance(100)
    bar.note("123 tokens")
    assert bar.facts(10.0) == ["100 of 400 rows", "0:30 left", "123 tokens", "0.2 MB/s"]
    bar.advance(300)
    assert bar.facts(10_000.0)[1] == "0:00 left"
    assert Bar("listing", unit="files", num_done=1_234).facts(5.0) == ["1,234 files"]


def test_a_terminal_shows_a_line_that_goes_away() -> None:
    main_end, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stderr=terminal, stdout=subprocess.PIPE, cwd=PROJECT,
        env=environment, text=True,
    ) as script:  # fmt: skip
        os.close(terminal)
        written = b""
        while True:
            try:
                written += os.read(main_end, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
        assert script.stdout is not None
        assert script.stdout.read() == "the result\n"
    os.close(main_end)

    text = written.decode()
    lines = CODES.sub("", text).replace("\r", "\n").splitlines()
    assert "looking at the files  …" in lines
    assert any(re.search(r"reading rows  ━.*of 20,000 rows  0:0\d left", line) for line in lines)
    assert max(map(len, lines)) <= 80
    assert text.rstrip().endswith("\x1b[2K"), "the line is erased"


def test_a_pipe_shows_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=PROJECT
    )
    assert (done.stdout, done.stderr) == ("the result\n", "")


class Kernel:
    """What a notebook's display is told."""

    def __init__(self) -> None:
        self.kernel = self
        self.shown: list[str] = []

    def display(self, content: dict[str, str], raw: bool, display_id: bool = False) -> Kernel:
        self.shown.append(content["text/html"])
        return self

    update = display


def test_a_notebook_shows_it_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    ipython = types.ModuleType("IPython")
    monkeypatch.setattr(ipython, "get_ipython", lambda: kernel, raising=False)
    monkeypatch.setattr(ipython, "display", kernel, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ipython)

    with progress("reading <rows>", total=4) as bar:
        bar.advance()
        note("7 tokens")
        wait_until(lambda: bool(kernel.shown))
    assert "reading &lt;rows&gt;" in kernel.shown[0]
    assert "1 of 4 rows · 7 tokens" in kernel.shown[0]
    assert "width:25.0%" in kernel.shown[0]
    assert kernel.shown[-1] == ""

    kernel.shown.clear()
    with progress("a short call"):
        time.sleep(progress_module.SILENT_SECONDS / 4)
    assert kernel.shown == []


def test_a_note_needs_no_call() -> None:
    note("nobody listens")
    assert "width" not in to_html(Bar("listing files"), 1.0)
