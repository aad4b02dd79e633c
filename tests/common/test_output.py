"""What is printed where nobody can read it ends nothing that makes more than its output."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from miles.common.output import outlived
from miles.common.screen import Screen
from tests.support.processes import PROJECT, closed_pipe

SCRIPT = """
import sys
from miles.common.output import outlived
with outlived():
    for number in range(100_000):
        print("line", number)
    print("end", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("where", "num_lines", "reason"),
    [
        ("| head -n 3", 3, "nobody reads it any more"),
        ("> /dev/full", 0, "no space left on the disk"),
        ("2>&1 | head -n 3", 3, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_a_process_goes_on_to_its_end(where: str, num_lines: int, reason: str) -> None:
    """Python's own flush at the end does not change its status."""
    line = f"set -o pipefail; {sys.executable} -c '{SCRIPT}' {where}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 7
    assert len(done.stdout.splitlines()) == num_lines
    said = f"miles: the standard output cannot be written ({reason}); the command goes on\nend\n"
    assert done.stderr == (said if reason else "")


def test_all_that_prints_is_covered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with outlived(), outlived():
            Screen().print("lost")
            Screen().print("lost as well")
            sys.stdout.writelines(["a", "b"])
            sys.stdout.flush()
        assert sys.stdout is pipe
    assert capsys.readouterr().err.count("miles: ") == 1

    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(BrokenPipeError), outlived(is_result=True):
            Screen().print("the result")
        with outlived():
            print("drop it", flush=True)


class FullStream(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a notebook."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, FullStream())
    with outlived():
        print("lost")
        assert not sys.stdout.isatty()
