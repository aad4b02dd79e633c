"""`miles chat`: in a pipe, and on a terminal of 80 columns with Ctrl-C."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from miles.chat.conversation import Conversation
from miles.chat.model import load
from miles.chat.settings import Sampling
from miles.chat.source import Choice, opened
from miles.cli import main
from tests.support.processes import without_patience

SHORT = ("--max-new-tokens", "12")


def chat(
    messages: str, model: Path, monkeypatch: pytest.MonkeyPatch, *more: str, status: int = 0
) -> None:
    """Run the command with messages in a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(messages))
    assert main(["chat", str(model), *SHORT, *more]) == status


def answers_of(model: Path, questions: Sequence[str], system: str | None = None) -> list[str]:
    """Return the greedy answers to questions of one conversation, by the functions below."""
    conversation = Conversation(system)
    with opened(str(model), Choice()) as found:
        chat_model = load(found)
    for question in questions:
        ids = chat_model.prompts.ids(conversation.messages(question)).tolist()
        answer = chat_model.answer(ids, Sampling(max_new_tokens=12))
        shown = "".join(answer)
        assert shown == answer.text
        conversation.add(question, shown)
    return [answer for _, answer in conversation.turns]


def test_a_pipe_has_the_answers_alone(
    small_run: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "saved.jsonl"
    chat(
        f"What is 2+2?\n\nAnd 3+3?\n/save {saved}\n/undo\nAnd 4+4?\n/reset\n//hm\n/exit\nnot read\n",
        small_run,
        monkeypatch,
        *("--system", "Be brief."),
    )
    printed = capsys.readouterr()
    first, second = answers_of(small_model, ["What is 2+2?", "And 3+3?"], "Be brief.")
    _, third = answers_of(small_model, ["What is 2+2?", "And 4+4?"], "Be brief.")
    (fourth,) = answers_of(small_model, ["/hm"], "Be brief.")
    assert printed.out == f"{first}\n{second}\n{third}\n{fourth}\n"

    told = without_patience(printed.err).splitlines()
    assert told[0] == f"{small_run}, step 7"
    for text in (f"saved to {saved}", "gone: And 3+3?", "2 questions taken back"):
        assert text in told
    (row,) = map(json.loads, saved.read_text().splitlines())
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][-1]["content"] == second


def test_a_fault_in_a_pipe_ends_the_talk(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat("/rest\n", small_model, monkeypatch, status=3)
    assert "miles: error: /rest: no command, or it lacks its FILE" in capsys.readouterr().err
    chat("word " * 5_000 + "\n", small_model, monkeypatch, status=3)
    assert "/undo takes the last question back, /reset all" in capsys.readouterr().err


def test_draws_are_the_same_for_a_seed(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        chat("2+2?\n", small_model, monkeypatch, "--temperature", "1", "--seed", seed)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


class Terminal:
    """A command in a terminal of 80 columns."""

    def __init__(self, words: Sequence[str]) -> None:
        self._own, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "miles.cli", *words],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
        os.close(other)
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def wait_for(self, text: str, since: int = 0) -> None:
        """Wait until a text appears behind a place of what was shown."""
        deadline = time.monotonic() + 120
        while text not in self.text[since:]:
            assert time.monotonic() < deadline, self.text
            try:
                self.text += os.read(self._own, 4096).decode(errors="replace")
            except OSError:  # its process has ended
                assert text in self.text[since:], self.text
                return

    def wait_for_more(self, num_characters: int, since: int) -> None:
        """Wait until something was shown behind a place."""
        while len(self.text) < since + num_characters:
            self.text += os.read(self._own, 4096).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


@contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    opened_terminal = Terminal(words)
    try:
        yield opened_terminal
    finally:
        opened_terminal.close()


CTRL_C = "\x03"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")


def test_ctrl_c_stops_an_answer_and_then_leaves(small_model: Path) -> None:
    with terminal("chat", str(small_model), "--max-new-tokens", "4000") as screen:
        screen.wait_for("> ")
        screen.type("2+2?\n")
        screen.wait_for("2+2?\r\n")
        asked = len(screen.text)
        screen.wait_for_more(100, since=asked)  # of the answer, whose random words have no end
        screen.type(CTRL_C)
        screen.wait_for("stopped; Ctrl-C once more, or /exit, leaves")
        screen.wait_for("> ", since=screen.text.index("leaves"))
        screen.type("/undo\n")
        screen.wait_for("gone: 2+2?")
        screen.wait_for("> ", since=screen.text.index("gone"))

        # What the user did since has made the first one forgotten. Python's readline does not
        # notice a Ctrl-C between its prompt and its wait for keys.
        place = len(screen.text)
        time.sleep(1.0)
        screen.type(CTRL_C)
        screen.wait_for("leaves", since=place)
        time.sleep(1.0)
        screen.type(CTRL_C)
        screen.wait_for("miles: Ctrl-C: left")
        assert screen.process.wait(60) == 130

    shown = ESCAPES.sub("", screen.text)
    assert "Traceback" not in shown
    heading = re.split(r"[\r\n]+", shown.partition("> ")[0])
    assert max(len(line) for line in heading if str(small_model) not in line) <= 80
