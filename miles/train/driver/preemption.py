"""SIGTERM, as a scheduler sends it some time before it kills: the step ends, a checkpoint is written, exit 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):
    """SIGTERM came while no step was under way: there is nothing to be saved."""


class StopSignal:
    """In a `with`, SIGTERM is heard. To be entered after `ray.init`, which sets a handler of its own."""

    def __init__(self) -> None:
        self.requested = False
        self._in_steps = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # elsewhere Python does not allow it
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def steps_begin(self) -> None:
        """From here on somebody looks at `requested` after every step; before, `Stopped` is raised at once."""
        self._in_steps = True
        if self.requested:
            raise Stopped

    def steps_end(self) -> None:
        self._in_steps = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if first and not self._in_steps:
            raise Stopped
