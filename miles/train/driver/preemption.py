"""Signals that ask a run to stop: SIGTERM of a scheduler, Ctrl-C, and a terminal that closes.

    during the steps   SIGTERM, SIGHUP, the first Ctrl-C   finish the step, save, exit with 0
                       the next Ctrl-C                     stop at once
    before, and after  SIGTERM, SIGHUP                     stop, exit with 0
                       Ctrl-C                              stop at once

A further SIGTERM changes nothing. A signal that was ignored before stays ignored, as under nohup.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from miles.common import output

CTRL_C = "Ctrl-C"
BETWEEN_STEPS = "Ctrl-C: stopped while no step was under way; nothing is lost"

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGINT: CTRL_C}


class Stopped(BaseException):
    """A signal came while no step was under way, so that there is nothing to save.

    No `Exception`, as `KeyboardInterrupt` is none: it may be raised inside anything, and whoever
    turns the errors of a filesystem into his own (`file_errors.reading`) must let it pass.
    """


class StopSignal:
    """Hears the signals while its context is entered.

    Enter it after `ray.init`, which sets a handler of its own.

    Args:
        tell: prints a sentence. It is called in a thread of its own.
    """

    def __init__(self, tell: Callable[[str], None] = lambda text: None) -> None:
        self.is_requested = False
        self.name = "SIGTERM"
        """the signal that came first, for the user"""
        self.step = 0
        """the step that is under way"""
        self._tell = tell
        self._in_steps = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python allows no handler to be set outside of the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def begin_steps(self) -> None:
        """Note a signal from now on, without raising: the caller checks `is_requested` each step.

        Before, and after `end_steps`, a signal raises `Stopped` at once, and Ctrl-C
        `KeyboardInterrupt`.

        Raises:
            Stopped: a signal came already.
        """
        self._in_steps = True
        if self.is_requested:
            raise Stopped

    def end_steps(self) -> None:
        """Let a signal raise `Stopped` again."""
        self._in_steps = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = not self.is_requested
        is_ctrl_c = number == signal.SIGINT
        if is_first:
            self.is_requested = True
            self.name = _NAMES[signal.Signals(number)]
        if number == signal.SIGHUP:
            output.drop(1, 2)  # the terminal is closed

        if is_ctrl_c and not (is_first and self._in_steps):
            raise KeyboardInterrupt
        if is_first and not self._in_steps:
            raise Stopped
        if is_ctrl_c:
            text = f"Ctrl-C: stopping after step {self.step}; once more to stop at once"
            # What was interrupted may be printing, and holds the locks of the screen.
            threading.Thread(target=self._tell, args=(text,), daemon=True).start()
