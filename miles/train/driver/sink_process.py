"""A sink in a process of its own, so that nothing that happens to it reaches the training.

    driver                       thread                            process
    write(numbers)  -> pending   one JSON line of steps  ->  pipe  sink.write of each
                       taken     <- one JSON line: taken, or the error

The driver only appends to a list. A thread hands the steps over, and waits. If the process dies,
fails or does not answer, it is killed, and another one is begun after a pause; it gets what the
first one had not safely written, and what came since.

The process leaves signals to the driver: it has a session of its own, and ends with the pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from miles.common import run_folder
from miles.common.counts import counted
from miles.errors import ConfigError

OPEN_SECONDS = 150.0
"""The time that a sink may take to open: a login that does not answer takes 10, wandb.init 90."""
ANSWER_SECONDS = 60.0
"""The time that it may take for some steps."""
CLOSE_SECONDS = 60.0
"""The time that the end of a run waits for it."""
HASTY_SECONDS = 2.0
"""The same after Ctrl-C."""
RETRY_SECONDS = 60.0
"""Pause before it is opened again."""
UNSAFE_CHARACTERS = 64 << 10
"""The most that a dying process may lose of what it took: wandb 0.31 writes its file by 32 KiB."""

_MAX_STEPS = 100
"""Steps that are handed over together."""
_PIPE_BYTES = 4096
"""A pipe that can be written takes at least as much at once (PIPE_BUF)."""

_CODE = "from miles.train.driver.sink_process import main; main()"


class SinkFailure(Exception):
    """A sink that died, failed, or did not answer."""


@dataclass(frozen=True)
class SinkRequest:
    """The settings that a sink is opened from."""

    title: str
    """its name for the user"""
    content: Mapping[str, Any]
    """for `boards.open_board`, with the step that comes first"""
    kept_in: str | None = None
    """folder in which it keeps what it has not sent; None: it sends nothing"""
    is_temporary: bool = False
    """the folder is removed once all is sent"""


class BackgroundSink:
    """Hands the numbers of the steps to a sink in another process.

    Args:
        first_step: of this attempt.
        must_open: raise where it cannot be opened at first; else it is tried again later.

    Raises:
        ConfigError: it cannot be opened.
    """

    def __init__(self, request: SinkRequest, first_step: int, *, must_open: bool) -> None:
        self._request = request
        self._title = request.title
        self._first_step = first_step
        self._changed = threading.Condition()

        self._pending = deque[str]()
        self._taken = deque[str]()
        self._num_taken_characters = 0
        self._notices: list[str] = []
        self._failure: str | None = None
        self._end: bool | None = None
        """None: more steps come; else whether the run has failed"""
        self._is_closed = False

        self._process: _Process | None = None
        try:
            self._open(first_step)
        except (SinkFailure, ConfigError) as error:
            self._drop_process()
            if must_open:
                self._remove_folder()
                raise ConfigError(str(error)) from None
            self._fail(str(error))
        self._thread = threading.Thread(target=self._run, name=f"miles-{self._title}", daemon=True)
        self._thread.start()

    def write(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        line = json.dumps(numbers)
        with self._changed:
            self._pending.append(line)
            self._changed.notify()

    @property
    def pid(self) -> int | None:
        """Return the number of its process; None while it has none."""
        return self._process.pid if self._process is not None else None

    @property
    def num_pending(self) -> int:
        """Return the number of steps that it has not taken yet."""
        return len(self._pending)

    def notices(self) -> list[str]:
        """Return what the user is to know since the last call."""
        with self._changed:
            notices = self._notices
            self._notices = []
        return notices

    def close(self, *, failed: bool, is_hasty: bool) -> None:
        """Hand over what is left, end the run there, and end the process in any case."""
        with self._changed:
            self._end = failed
            self._changed.notify()
        seconds = HASTY_SECONDS if is_hasty else CLOSE_SECONDS
        self._thread.join(seconds)
        with self._changed:
            process = self._process
            if process is not None and not self._is_closed:
                self._failure = self._failure or f"it did not end within {seconds:g} seconds"
                process.kill()  # the thread hears of it
        self._thread.join(HASTY_SECONDS)
        if self._is_closed:
            self._remove_folder()
        else:
            self._notices.append(self._farewell())

    def _farewell(self) -> str:
        """Return what a sink lacks that could not be ended."""
        text = f"{self._title} could not be ended ({self._failure})"
        if self._pending:
            text += f", and lacks the last {counted(len(self._pending), 'step')}"
        text += f". {run_folder.METRICS} has every step"
        if self._request.kept_in:
            text += f"; wandb sync sends what is kept in {self._request.kept_in}"
        return text

    def _remove_folder(self) -> None:
        if self._request.is_temporary and self._request.kept_in:
            shutil.rmtree(self._request.kept_in, ignore_errors=True)

    # --- in the thread

    def _run(self) -> None:
        try:
            self._hand_over()
        finally:
            self._drop_process()

    def _hand_over(self) -> None:
        """Hand over steps until the end; open the sink again where it fails."""
        while True:
            self._wait_for_steps()
            try:
                if self._process is None:
                    self._reopen()
                assert self._process is not None
                steps = self._next_steps()
                if not steps:
                    assert self._end is not None
                    self._process.ask({"close": self._end}, 2 * CLOSE_SECONDS)
                    self._is_closed = True
                    return
                self._process.ask({"steps": steps}, ANSWER_SECONDS)
            except (SinkFailure, ConfigError) as error:
                self._drop_process()
                self._fail(str(error))
                if self._end is not None:
                    return
                self._pause()
            else:
                self._confirm(len(steps))

    def _drop_process(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _wait_for_steps(self) -> None:
        """Wait until there are steps, or the end is near."""
        with self._changed:
            while not self._pending and self._end is None:
                self._changed.wait()

    def _next_steps(self) -> list[str]:
        """Return the steps that are to be handed over next; none at the end."""
        with self._changed:
            return [self._pending[i] for i in range(min(_MAX_STEPS, len(self._pending)))]

    def _confirm(self, num_steps: int) -> None:
        """Note that the first steps were taken, and that the sink works."""
        with self._changed:
            for _ in range(num_steps):
                line = self._pending.popleft()
                self._taken.append(line)
                self._num_taken_characters += len(line)
            while self._num_taken_characters > UNSAFE_CHARACTERS:
                self._num_taken_characters -= len(self._taken.popleft())

            if self._failure is not None:
                self._failure = None
                self._notices.append(f"{self._title} works again, and has the steps since then")

    def _fail(self, cause: str) -> None:
        """Note a failure; report the first one."""
        with self._changed:
            if self._failure is None and self._end is None:
                self._notices.append(
                    f"{self._title} failed ({cause.rstrip('.')}); the run goes on, and keeps its "
                    "metrics for it until it works again"
                )
            if self._failure is None or self._end is None:
                self._failure = cause

    def _pause(self) -> None:
        """Wait before the sink is opened again, at most until the end of the run."""
        deadline = time.monotonic() + RETRY_SECONDS
        with self._changed:
            while self._end is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def _reopen(self) -> None:
        """Open the sink once more, for the steps that it may lack."""
        with self._changed:
            self._pending.extendleft(reversed(self._taken))
            self._taken.clear()
            self._num_taken_characters = 0
            first = self._pending[0] if self._pending else None
        first_step = self._first_step if first is None else int(json.loads(first)["step"])
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        """Start the process, and wait until the sink is open.

        Raises:
            ConfigError: it says why it cannot be opened.
            SinkFailure: it died, or did not answer.
        """
        self._process = _Process(f"{self._title} did not answer in time")
        self._process.ask({**self._request.content, "first_step": first_step}, OPEN_SECONDS)


class _Process:
    """The process of a sink, as the driver sees it."""

    def __init__(self, silence: str) -> None:
        self._silence = silence
        own_end, its_end = os.pipe()
        import_path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        environment = {**os.environ, "PYTHONPATH": import_path}
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-c", _CODE, str(its_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[its_end],
            env=environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        os.close(its_end)
        assert self._process.stdin is not None
        self._questions = self._process.stdin.fileno()
        os.set_blocking(self._questions, False)
        self._answers = own_end
        self._buffer = b""

    def ask(self, question: Mapping[str, Any], seconds: float) -> None:
        """Send a question, and wait for its answer.

        Raises:
            ConfigError: the sink cannot be opened as it is asked for.
            SinkFailure: the sink failed, died, or did not answer in time.
        """
        deadline = time.monotonic() + seconds
        try:
            self._send(json.dumps(question).encode() + b"\n", deadline)
            answer = json.loads(self._receive(deadline))
        except OSError as error:
            raise SinkFailure("its process has died") from error
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "failed" in answer:
            raise SinkFailure(answer["failed"])

    def kill(self) -> None:
        """End the process, and what it has started."""
        children = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(HASTY_SECONDS)

    def close(self) -> None:
        """End the process, and close the pipes."""
        self.kill()
        os.close(self._answers)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _send(self, content: bytes, deadline: float) -> None:
        rest = memoryview(content)
        while rest:
            _, ready, _ = select.select([], [self._questions], [], _until(deadline))
            if not ready:
                raise SinkFailure(self._silence)
            rest = rest[os.write(self._questions, rest[:_PIPE_BYTES]) :]

    def _receive(self, deadline: float) -> bytes:
        """Return the next line of the process."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], _until(deadline))
            if not ready:
                raise SinkFailure(self._silence)
            chunk = os.read(self._answers, _PIPE_BYTES)
            if not chunk:
                raise SinkFailure("its process has died")
            line += chunk
        return line


def _until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def main() -> None:
    """Open a sink as the first line of the standard input says; write the steps of the others."""
    from miles.train.driver import boards

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    questions = queue.SimpleQueue[str]()
    threading.Thread(target=_read_questions, args=(questions,), daemon=True).start()
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        sink = boards.open_board(json.loads(questions.get()))
        answer({})
        while True:
            question = json.loads(questions.get())
            if "close" in question:
                sink.close(failed=question["close"])
                break
            for step in question["steps"]:
                sink.write(json.loads(step))
            sink.flush()
            answer({})
        answer({})
    except ConfigError as error:
        answer({"refused": str(error)})
    except Exception as error:  # a library's own, of any kind
        answer({"failed": f"{type(error).__name__}: {error}"})
    # What a library does when its process ends may wait for a network that is gone.
    os._exit(0)


def _read_questions(questions: queue.SimpleQueue[str]) -> None:
    """Pass on the lines of the standard input; end the process where the driver is gone."""
    for line in sys.stdin:
        questions.put(line)
    os._exit(1)
