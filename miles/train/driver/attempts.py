"""`starts.jsonl` in the run's folder: every start of a run with its reason, and every end that could be noted.

{"start": 1, "time": "…", "reason": "new run", "first_step": 0, "checkpoint": "…/release", "world_size": 8, …}
{"end": 1, "time": "…", "how": "SIGTERM", "next_step": 137}
{"start": 2, "time": "…", "reason": "the same command again, after SIGTERM", "first_step": 137, …}
{"start": 3, "time": "…", "reason": "the same command again; start 2 has no end: it was killed", …}
"""

from __future__ import annotations

import json
from typing import Any

from miles import __version__
from miles.common import json_lines, run_folder, storage
from miles.common.redact import redact
from miles.train.driver.run_log import time_now
from miles.train.parallel_layout import Layout


class Starts:
    """Writes them down.

    Args:
        url: the run's folder (fsspec URL).
    """

    def __init__(self, url: str) -> None:
        self._path = storage.join(url, run_folder.ATTEMPTS)
        self._entries: list[dict[str, Any]] = json_lines.read(self._path)

    def begin(self, first_step: int, checkpoint: str, layout: Layout) -> str:
        """Enters a start; returns its reason."""
        reason = self._reason(first_step)
        number = 1 + sum("start" in entry for entry in self._entries)
        sizes = {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "expert": layout.expert,
        }
        self._add(
            {
                "start": number,
                "reason": reason,
                "first_step": first_step,
                "checkpoint": redact(checkpoint),
                "world_size": layout.world_size,
                **sizes,
                "miles": __version__,
            }
        )
        return reason

    def end(self, how: str, next_step: int) -> None:
        """Enters how the last start ended, and the first step that it did not train."""
        number = sum("start" in entry for entry in self._entries)
        if number:
            self._add({"end": number, "how": redact(how), "next_step": next_step})

    def _reason(self, first_step: int) -> str:
        if not self._entries:
            return "new run" if first_step == 0 else "continues a checkpoint of another folder"
        last = self._entries[-1]
        if "start" in last:
            return f"the same command again; start {last['start']} has no end: it was killed"
        if last.get("restarts"):
            return f"restarted after {last['how']}"
        return f"the same command again, after {last['how']}"

    def restarts(self) -> None:
        """Notes that the loop itself starts again."""
        self._entries[-1]["restarts"] = True
        self._write()

    def _add(self, entry: dict[str, Any]) -> None:
        kind, *rest = entry.items()
        self._entries.append(dict([kind, ("time", time_now()), *rest]))
        self._write()

    def _write(self) -> None:
        json_lines.write(self._path, map(json.dumps, self._entries))
