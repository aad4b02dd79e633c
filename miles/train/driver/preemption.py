"""SIGTERM, which a scheduler sends before it kills: finish the step, save, exit with 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):
    """SIGTERM came while no step was under way, so that there is nothing to save."""


class StopSignal:
    """Hears SIGTERM while its context is entered.

    Enter it after `ray.init`, which sets a handler of its own.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._in_steps = False
        self._previous_handler: Any = None

    def __enter__(self) -> Self:
        # Python allows no handler to be set outside of the main thread.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def begin_steps(self) -> None:
        """Note a signal from now on, without raising: the caller checks `is_requested` each step.

        Before, and after `end_steps`, a signal raises `Stopped` at once.

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
        self.is_requested = True
        if is_first and not self._in_steps:
            raise Stopped
