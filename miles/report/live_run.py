"""A run that goes on, as its page needs it: what is new since a version that the page has.

    version 1     the page as it was opened
    version 2     a step more: {"version": 2, "data": the charts, "parts": {"numbers": …}}
    version 3     an evaluation: the parts made of eval_samples.jsonl as well

Of metrics.jsonl only what was appended is read; another file is read again when it has changed. All
of it is done when a page asks: without one, nothing is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from miles.common import run_folder, storage
from miles.errors import MissingFileError
from miles.report.columns import Columns
from miles.report.html_page import charts_of, frame
from miles.report.parts import LEFT_OUT, PARTS, RunView, render, render_left_out
from miles.report.tail import GrowingFile

_FILES = sorted({name for part in PARTS for name in part.files} - {run_folder.METRICS})


class LiveRun:
    """The content of a page that follows a run. Threads may share it.

    Args:
        folder: of the run (fsspec URL).
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._columns = Columns()
        path = storage.join(folder, run_folder.METRICS)
        self.metrics = GrowingFile(path, self._add, self._restart)
        self._stamps: dict[str, str] = {}
        # A page of a server that listened here before has another version.
        self._version = time.time_ns() // 1_000_000
        self._is_new = True
        self._data: Mapping[str, Any] = {}
        self._parts: dict[str, str] = {}
        self._left_out: dict[str, list[str]] = {}
        self._changed_in: dict[str, int] = {}
        """name of a part -> the version in which it became what it is"""

    def page(self) -> str:
        """Return the page as it is now."""
        with self._lock:
            self._look()
            return frame(self._folder, self._parts, self._data, version=self._version)

    def news(self, version: int) -> dict[str, Any]:
        """Return what is new to a page of a version; JSON-able. Only `version` where nothing is."""
        with self._lock:
            self._look()
            if version == self._version:
                return {"version": version}
            parts = {}
            for name, changed_in in self._changed_in.items():
                if changed_in > version:
                    parts[name] = self._parts[name]
            return {"version": self._version, "data": self._data, "parts": parts}

    def _add(self, line: dict[str, Any]) -> None:
        self._columns.add(line)

    def _restart(self) -> None:
        self._columns = Columns()

    def _look(self) -> None:
        """Bring the content up to date."""
        changed = {name for name in _FILES if self._has_changed(name)}
        if self.metrics.look():
            changed.add(run_folder.METRICS)
        if not changed and not self._is_new:
            return

        self._version += 1
        for part in PARTS:
            if self._is_new or changed.intersection(part.files):
                view = RunView(self._folder, self._columns)
                self._keep(part.name, render(view, part))
                self._left_out[part.name] = view.left_out

        view = RunView(self._folder, self._columns)
        self._data = charts_of(view)
        self._left_out["charts"] = view.left_out
        for sentences in self._left_out.values():
            for sentence in sentences:
                view.leave_out(sentence)
        self._keep(LEFT_OUT, render_left_out(view))
        self._is_new = False

    def _keep(self, name: str, html: str) -> None:
        if self._parts.get(name) != html:
            self._parts[name] = html
            self._changed_in[name] = self._version

    def _has_changed(self, name: str) -> bool:
        """Return whether a file was written since the last look."""
        try:
            answer = storage.info(storage.join(self._folder, name))
            stamp = f"{answer.get('size')} {storage.stamp_of(answer)}"
        except MissingFileError:
            stamp = ""
        is_new = self._stamps.get(name) != stamp
        self._stamps[name] = stamp
        return is_new
