"""A long call says what it does and how far it is, on a line that goes away when it is done.

    with progress("reading rows", total=16_418) as bar:
        bar.advance(1_000)               reading rows ━━━━╌╌╌╌╌╌  7,000 of 16,418 rows  0:04 left
        bar.note("2,104,332 tokens")     the same, and 2,104,332 tokens at its end

    a terminal    a line on stderr
    a notebook    a line below the cell, without ipywidgets
    a pipe        nothing, or a plain line every 10 s inside of `lines_in_pipes`

A call that is over within half a second shows nothing. Inside of one another, the innermost is shown. Where
`total_bytes` is given, the line has MB/s, too.
"""

from __future__ import annotations

import contextlib
import contextvars
import html
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from miles.common import patience

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SILENT_SECONDS = 0.2
"""A call that takes longer says what it does, after one more `REFRESH_SECONDS`."""
REFRESH_SECONDS = 0.2
"""Between two looks at how far it is."""
PIPE_SECONDS = 10.0
"""Between two lines in a pipe."""
BAR_COLUMNS = 16


@dataclass(eq=False)
class Bar:
    """The work of a call, and how far it is."""

    text: str
    """such as "reading rows" """
    total: int | None = None
    """of `unit`; None: it is not known"""
    unit: str = "rows"
    total_bytes: int | None = None
    """of the whole work, for a rate in MB/s; None: no rate is shown"""
    num_done: int = 0
    noted: str = ""
    begun: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1) -> None:
        """Count what is done. It costs no more than the addition."""
        self.num_done += count

    def note(self, text: str) -> None:
        """Show a text at the end of the line, such as "2,104,332 tokens", in place of the last one."""
        self.noted = text

    @property
    def share(self) -> float | None:
        """The share that is done, at most 1; None where the total is not known."""
        return min(self.num_done / self.total, 1.0) if self.total else None

    def facts(self, seconds: float) -> list[str]:
        """Return how far it is, in words, the most important first.

        Args:
            seconds: since the work began.
        """
        facts = []
        if self.total is not None:
            facts.append(f"{self.num_done:,} of {self.total:,} {self.unit}")
        elif self.num_done:
            facts.append(f"{self.num_done:,} {self.unit}")

        is_measured = bool(self.share) and seconds >= 1
        if self.share and is_measured:
            facts.append(f"{_clock(seconds / self.share - seconds)} left")
        if self.noted:
            facts.append(self.noted)
        if self.share and is_measured and self.total_bytes:
            facts.append(f"{self.total_bytes * self.share / seconds / 1e6:,.1f} MB/s")
        return facts


@contextlib.contextmanager
def progress(
    text: str, total: int | None = None, *, unit: str = "rows", total_bytes: int | None = None
) -> Iterator[Bar]:
    """Show what is done in this context, where someone watches.

    Args:
        text: what is done, such as "reading rows".
        total: how much there is to do, of `unit`.
        total_bytes: of the same work.
    """
    bar = Bar(text, total, unit, total_bytes)
    _LINE.push(bar)
    try:
        yield bar
    finally:
        _LINE.pop(bar)


@contextlib.contextmanager
def lines_in_pipes() -> Iterator[None]:
    """Have long calls in this context print a plain line now and then where no line can change."""
    _LINE.has_pipe_lines = True
    try:
        yield
    finally:
        _LINE.has_pipe_lines = False


def note(text: str) -> None:
    """Show a text at the end of the line of the call in progress, if there is one."""
    if bar := _LINE.current:
        bar.note(text)


class _Display(Protocol):
    """The place where a line is shown."""

    def show(self, bar: Bar) -> None: ...

    def close(self) -> None:
        """Take the line away."""


class _Line:
    """The one line of this process: of the innermost call in progress."""

    def __init__(self) -> None:
        self._bars: list[Bar] = []
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self.has_pipe_lines = False

    @property
    def current(self) -> Bar | None:
        return self._bars[-1] if self._bars else None

    def push(self, bar: Bar) -> None:
        """Begin to show a call; those around it wait for its end."""
        with self._lock:
            self._bars.append(bar)
            if len(self._bars) == 1 and (is_watched() or self.has_pipe_lines):
                self._is_over = threading.Event()
                # A notebook knows by the context which cell a thread prints for.
                work = (self._show, self._is_over)
                self._thread = threading.Thread(
                    target=contextvars.copy_context().run, args=work, daemon=True
                )
                self._thread.start()

    def pop(self, bar: Bar) -> None:
        """Show a call no more. After the last one, the line is gone."""
        with self._lock:
            self._bars.remove(bar)
            if self._bars or self._thread is None:
                return
            thread = self._thread
            self._thread = None
            self._is_over.set()
        thread.join()

    def _show(self, is_over: threading.Event) -> None:
        """Show the innermost call until all are over. Runs in a thread of its own."""
        if is_over.wait(SILENT_SECONDS):
            return
        try:
            display = _display()
            with patience.others_speak():
                while not is_over.wait(REFRESH_SECONDS):
                    if bar := self.current:
                        display.show(bar)
            display.close()
        except OSError:  # the terminal is gone, or nobody reads any more
            return


_LINE = _Line()


def is_watched() -> bool:
    """Return whether anybody sees a line that changes: a terminal at stderr, or a notebook."""
    return is_notebook() or _is_terminal(sys.stderr)


def _is_terminal(stream: Any) -> bool:
    if not getattr(stream, "isatty", lambda: False)():
        return False
    from miles.common.screen import Screen, is_live  # rich: a tenth of a second

    return is_live(Screen(file=stream))


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, and no IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _display() -> _Display:
    """Return where a line is shown: where it is watched, or else in a pipe."""
    if is_notebook():
        return _Notebook()
    return _Terminal() if is_watched() else _Pipe()


class _Pipe:
    """A plain line on stderr now and then."""

    def __init__(self) -> None:
        self._due = time.monotonic() + PIPE_SECONDS

    def show(self, bar: Bar) -> None:
        if (now := time.monotonic()) >= self._due:
            self._due = now + PIPE_SECONDS
            facts = ", ".join(bar.facts(now - bar.begun))
            print(f"miles: {bar.text}: {facts}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave what was printed."""


class _Terminal:
    """A line of a terminal, on stderr; what others print stands above it."""

    def __init__(self) -> None:
        from rich.live import Live

        from miles.common.screen import Screen

        # What is printed to a file or a pipe stays there.
        self._live = Live(
            console=Screen(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=_is_terminal(sys.stdout),
        )
        self._live.start()

    def show(self, bar: Bar) -> None:
        self._live.update(_TerminalLine(bar), refresh=True)

    def close(self) -> None:
        self._live.stop()


@dataclass(frozen=True)
class _TerminalLine:
    """A bar as one line, with as many of its facts as there is room for."""

    bar: Bar

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = self.bar
        facts = bar.facts(time.monotonic() - bar.begun)
        head = f"{bar.text}  "
        room = options.max_width - len(head)

        # The number and the time left matter more than the drawing.
        has_bar = bar.share is not None and room >= BAR_COLUMNS + sum(map(len, facts[:2])) + 4
        room -= BAR_COLUMNS + 2 if has_bar else 0
        shown = ""
        for fact in facts:
            if len(shown) + len(fact) > room:
                break
            shown += f"{fact}  "

        line = Table.grid()
        cells: list[Text | ProgressBar] = [Text(head, no_wrap=True)]
        if has_bar:
            cells.append(ProgressBar(total=1.0, completed=bar.share or 0.0, width=BAR_COLUMNS))
            cells.append(Text("  "))
        cells.append(Text(shown.rstrip() or "…", no_wrap=True))
        line.add_row(*cells)
        yield line


# Translucent colours over the page's own: for light and dark themes.
_LINE_CSS = "font:13px/1.6 system-ui,sans-serif;opacity:.8;padding:2px 0"
_TRACK_CSS = (
    "display:inline-block;vertical-align:middle;width:12em;height:6px;border-radius:3px;"
    "background:rgba(128,128,128,.25);margin:0 .8em;overflow:hidden"
)
_DONE_CSS = "display:block;height:100%;background:rgba(46,160,67,.85)"


class _Notebook:
    """An output below the cell that runs; it is emptied at the end."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, bar: Bar) -> None:
        self._put(to_html(bar, time.monotonic() - bar.begun), bar.text)

    def close(self) -> None:
        if self._handle is not None:
            self._put("", "")

    def _put(self, fragment: str, text: str) -> None:
        from IPython import display

        content = {"text/html": fragment, "text/plain": text}
        if self._handle is None:
            self._handle = display.display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def to_html(bar: Bar, seconds: float) -> str:
    """Return a bar as a fragment of HTML: inline styles, no scripts, all text escaped."""
    drawn = " … "
    if bar.share is not None:
        done = f'<span style="{_DONE_CSS};width:{bar.share:.1%}"></span>'
        drawn = f'<span style="{_TRACK_CSS}">{done}</span>'
    facts = html.escape(" · ".join(bar.facts(seconds)))
    return f'<div style="{_LINE_CSS}">{html.escape(bar.text)}{drawn}{facts}</div>'


def _clock(seconds: float) -> str:
    """Return a time as `0:04`, or with hours as `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
