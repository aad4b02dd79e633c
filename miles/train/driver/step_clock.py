"""The seconds from step to step, without the pauses for evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class StepClock:
    """Measures the seconds between calls of `lap`, less those within `pause`."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._is_paused = False

    def lap(self) -> float:
        """Return the seconds since the last call."""
        now = time.perf_counter()
        seconds = now - self._since
        self._since = now
        return seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time within the context. A pause within a pause counts once."""
        if self._is_paused:
            yield
            return

        self._is_paused = True
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begun
            self._is_paused = False
