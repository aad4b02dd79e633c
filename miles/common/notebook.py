"""A line with a bar in a notebook's output, which changes in place.

    bar = NotebookBar("training", 40)      training  ▓▓▓▓░░░░░░  12/40  loss 3.2114
    bar.update(12, "loss 3.2114")

Plain HTML, shown by IPython, which is there in every notebook: no widgets are needed. A program that
reads the output as text gets the last line.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any

_SECONDS = 0.2
"""Between two pictures, at least."""


def is_here() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookBar:
    """Shows how far something is.

    Args:
        label: what is done.
        total: steps of all of it.
        num_done: steps that are done already.
        now: the seconds on a clock.
    """

    def __init__(
        self,
        label: str,
        total: int,
        num_done: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._num_done = num_done
        self._first_done = num_done
        self._text = ""
        self._now = now
        self._begun = self._shown = now()
        self._display = _display(self._bundle())

    def update(self, num_done: int, text: str) -> None:
        """Show how many steps are done, and a text behind them."""
        self._num_done = num_done
        self._text = text
        now = self._now()
        if now - self._shown >= _SECONDS:
            self._shown = now
            self._show()

    def stop(self) -> None:
        """Leave the line with what was told last."""
        self._show()

    def _show(self) -> None:
        if self._display is not None:
            self._display.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        """Return the line as text and as HTML."""
        count = f"{self._num_done:,}/{self._total:,}"
        text = " ".join(part for part in (self._text, self._time_left()) if part)
        bar = (
            f'<progress max="{max(self._total, 1)}" value="{self._num_done}" '
            f'aria-label="{html.escape(self._label)}" style="vertical-align:middle"></progress>'
        )
        return {
            "text/plain": f"{self._label} {count}  {text}",
            "text/html": (
                '<div style="font:14px/1.5 system-ui,sans-serif">'
                f"{html.escape(self._label)} {bar} {count} &nbsp; {html.escape(text)}</div>"
            ),
        }

    def _time_left(self) -> str:
        num_new = self._num_done - self._first_done
        num_left = self._total - self._num_done
        if not num_new or not num_left:
            return ""
        seconds = round((self._now() - self._begun) / num_new * num_left)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f" {left} left"


def _display(bundle: dict[str, str]) -> Any:
    """Show a bundle, and return what changes it."""
    from IPython.display import display

    return display(bundle, raw=True, display_id=True)
