"""The loop of `miles chat`: a message in, an answer out, while it is written.

    on a terminal   "> " asks; the answer comes in words, broken at the edge of the screen
    in a pipe       a message a line; each answer is followed by a newline, and nothing else stands
                    on the standard output

What is told of the model, of commands and of faults goes to the error stream. A message that begins
with a slash is a command; two slashes begin a message with one.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from miles.chat.conversation import Conversation
from miles.chat.model import Answer, ChatModel
from miles.chat.settings import Sampling
from miles.chat.wrapping import Wrapper
from miles.common.counts import counted
from miles.common.local_paths import absolute
from miles.common.prose import Prose
from miles.common.screen import Screen, printable
from miles.data.types import RowRejected
from miles.errors import DataError, MilesError

COMMANDS = {
    "/reset": "begin anew",
    "/undo": "take the last question and answer back",
    "/save FILE": "append the conversation to a file, as a row of training data",
    "/help": "these lines",
    "/exit": "leave; so does the end of the input (Ctrl-D)",
}
_MIN_COLUMNS = 20


class _Left(Exception):
    """The user leaves."""


@dataclass
class Talk:
    """A talk with a model, on the standard streams."""

    model: ChatModel
    sampling: Sampling
    conversation: Conversation
    is_terminal: bool
    """messages come from a terminal, and answers go to one"""
    screen: Screen
    """for all but answers: the error stream"""

    def run(self, read: Callable[[], str | None]) -> None:
        """Answer messages until they end, or the user leaves.

        Args:
            read: returns the next message; None: there is none.

        Raises:
            KeyboardInterrupt: Ctrl-C twice.
            DataError: an answer fails, where nobody sits at a terminal.
        """
        was_stopped = False
        while True:
            try:
                message = read()
                if message is None:
                    return
                was_stopped = False
                if message.strip():
                    self._take(message.strip())
            except _Left:
                return
            except KeyboardInterrupt:
                if was_stopped:
                    raise KeyboardInterrupt("Ctrl-C: left") from None
                was_stopped = True
                self._tell("stopped; Ctrl-C once more, or /exit, leaves", breaks=True)

    def _take(self, message: str) -> None:
        """Answer a message, or do what a command says."""
        try:
            if message.startswith("/") and not message.startswith("//"):
                self._do(message)
            else:
                self._answer(message[1:] if message.startswith("//") else message)
        except RowRejected as rejected:
            self._fail(DataError(f"training would reject this conversation, as {rejected}"))
        except MilesError as error:
            self._fail(error)

    def _fail(self, error: MilesError) -> None:
        """Tell a person what went wrong; end where nobody would read it.

        Raises:
            MilesError: nobody sits at a terminal.
        """
        if not self.is_terminal:
            raise error
        self._tell(f"error: {error}")

    def _do(self, line: str) -> None:
        """Do what a command says.

        Raises:
            DataError: there is no such command.
        """
        name, _, rest = line.partition(" ")
        if name == "/exit":
            raise _Left
        if name == "/reset":
            self._tell(f"{counted(self.conversation.reset(), 'question')} taken back")
        elif name == "/undo":
            question = self.conversation.undo()
            self._tell("there is nothing to take back" if question is None else f"gone: {question}")
        elif name == "/save" and rest.strip() and not self.conversation.turns:
            self._tell("there is nothing to save")
        elif name == "/save" and rest.strip():
            url = absolute(rest.strip())
            self.conversation.save(url)
            self._tell(f"saved to {url}")
        elif name == "/help":
            for command, text in COMMANDS.items():
                self._tell(f"{command:<11} {text}")
        else:
            known = ", ".join(COMMANDS)
            raise DataError(
                f"{line.split()[0]}: no command, or it lacks its FILE; there are {known}. A message "
                "that begins with a slash is written with two"
            )

    def _answer(self, question: str) -> None:
        """Write the answer to a question, and keep both.

        Raises:
            RowRejected: training would reject the conversation.
            DataError: the conversation is too long for the model.
        """
        messages = self.conversation.messages(question)
        ids = self.model.prompts.ids(messages).tolist()
        limit = self.model.decoder.max_tokens
        if len(ids) >= limit:
            raise DataError(
                f"the conversation has {len(ids):,} tokens, and the model takes {limit:,} with the "
                "answer: /undo takes the last question back, /reset all"
            )

        answer = self.model.answer(ids, self.sampling)
        started = time.perf_counter()
        try:
            self._show(answer)
        finally:
            # What an interrupted answer says so far is part of the conversation: it was read.
            if answer.token_ids:
                self.conversation.add(question, answer.text)
        if self.is_terminal:
            self._tell(_account(answer, time.perf_counter() - started))

    def _show(self, answer: Answer) -> None:
        """Write an answer while it is made."""
        wrapper = Wrapper(_num_columns() if self.is_terminal else None)
        try:
            for piece in answer:
                # In a pipe, a program reads the text as it is.
                text = printable(piece) if self.is_terminal else piece
                _write(wrapper.add(text))
        except KeyboardInterrupt:
            if not self.is_terminal:  # there, the line ends with what is told
                _write("\n")
            raise
        _write(f"{wrapper.end()}\n")

    def _tell(self, text: str, *, breaks: bool = False) -> None:
        """Tell the user something that is no answer.

        Args:
            breaks: a line is begun on the terminal.
        """
        if breaks and self.is_terminal:
            self.screen.print()
        self.screen.print(Prose(Text(text, "dim")), soft_wrap=True)


def heading(title: str, model: ChatModel, sampling: Sampling) -> Sequence[str]:
    """Return what is told before the first message."""
    return [
        title,
        f"{model.device}, {sampling.describe()}, at most {sampling.max_new_tokens:,} tokens an "
        "answer",
        *model.notes,
    ]


def from_terminal() -> str | None:
    """Return the next message of a terminal, with the keys of readline where Python has it."""
    try:
        return input("> ")
    except EOFError:
        sys.stderr.write("\n")
        return None


def from_pipe() -> str | None:
    """Return the next line of the standard input."""
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _account(answer: Answer, seconds: float) -> str:
    """Return how an answer ended, and how fast it came."""
    num_tokens = len(answer.token_ids)
    ends = {"length": ", cut at the limit"}.get(answer.finish, "")
    return f"[{counted(num_tokens, 'token')}{ends}, {num_tokens / max(seconds, 1e-9):.0f} a second]"


def _num_columns() -> int:
    return max(shutil.get_terminal_size().columns, _MIN_COLUMNS)


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
