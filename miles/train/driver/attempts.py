"""The attempts of a run: restarts after a failure, and the log of all attempts.

`starts.jsonl` in the run folder has every beginning of an attempt with its reason, and every end
that could be noted:

{"start": 1, "time": "…", "reason": "new run", "first_step": 0, "checkpoint": "…/release", …,
 "first_checkpoint": 100}
{"end": 1, "time": "…", "how": "SIGTERM", "next_step": 137}
{"start": 2, "time": "…", "reason": "the same command again, after SIGTERM", "first_step": 137, …}
{"start": 3, "time": "…", "reason": "the same command again; start 2 has no end: it was killed", …}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from miles import __version__
from miles.common import run_folder, storage
from miles.common.patient_file import PatientFile, Report
from miles.common.redact import redact
from miles.common.run_record import FIRST_CHECKPOINT
from miles.errors import ClusterError, NoRoomError
from miles.train.config import TrainConfig
from miles.train.driver.run_log import RunLog, time_now
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.types import StartPoint

T = TypeVar("T")


class AttemptLog:
    """Writes the log of the attempts.

    Args:
        run_dir: the run folder (fsspec URL).
        report: is told if it cannot be written; the run goes on.
    """

    def __init__(self, run_dir: str, report: Report = print) -> None:
        self._file = PatientFile.read(storage.join(run_dir, run_folder.ATTEMPTS), report)
        self._entries = [json.loads(line) for line in self._file.lines]

    def begin(self, first_step: int, checkpoint: str, layout: Layout, precision: Precision) -> str:
        """Enter the beginning of an attempt; return its reason."""
        reason = self._reason(first_step)

        self._add(
            {
                "start": self._num_attempts + 1,
                "time": time_now(),
                "reason": reason,
                "first_step": first_step,
                "checkpoint": redact(checkpoint),
                "world_size": layout.world_size,
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "data": layout.data,
                "expert": layout.expert,
                "precision": precision.value,
                "miles": __version__,
                FIRST_CHECKPOINT: None,
            }
        )

        return reason

    def note_checkpoint(self, iteration: int) -> None:
        """Note the first checkpoint of the last attempt; later ones are passed over."""
        starts = [entry for entry in self._entries if "start" in entry]
        if starts and starts[-1].get(FIRST_CHECKPOINT) is None:
            starts[-1][FIRST_CHECKPOINT] = iteration
            self._write()

    def end(self, how: str, next_step: int) -> None:
        """Enter how the last attempt ended, and the first step that it did not train."""
        if self._num_attempts:
            self._add(
                {
                    "end": self._num_attempts,
                    "time": time_now(),
                    "how": redact(how),
                    "next_step": next_step,
                }
            )

    def mark_restart(self) -> None:
        """Note at the last end that the driver itself starts another attempt."""
        if not self._entries:  # the first attempt was lost before it had begun
            return
        self._entries[-1]["restarts"] = True
        self._write()

    @property
    def is_restarting(self) -> bool:
        """Return whether the next attempt is a restart: part of a run that is under way."""
        return bool(self._entries) and "restarts" in self._entries[-1]

    @property
    def _num_attempts(self) -> int:
        return sum("start" in entry for entry in self._entries)

    def _reason(self, first_step: int) -> str:
        if not self._entries:
            return "new run" if first_step == 0 else "continues a checkpoint of another folder"
        last = self._entries[-1]
        if "start" in last:
            return f"the same command again; start {last['start']} has no end: it was killed"
        if last.get("restarts"):
            return f"restarted after {last['how']}"
        return f"the same command again, after {last['how']}"

    def _add(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        self._write()

    def _write(self) -> None:
        self._file.replace(json.dumps(entry) for entry in self._entries)


def with_restarts(
    config: TrainConfig,
    start: StartPoint,
    run_log: RunLog,
    attempt_log: AttemptLog,
    attempt: Callable[[StartPoint], T],
) -> T:
    """Make attempts until one does not lose a part of the run; return its result.

    Each begins from the last complete checkpoint. `config.max_restarts` limits how often they begin
    from the same one.

    Args:
        start: of the first attempt.
        attempt: from a start point to the result.

    Raises:
        MilesError: an attempt failed in a way that another one would not mend, or too often.
    """
    failed_start = None
    num_failures = 0
    while True:
        try:
            return attempt(start)
        except NoRoomError:
            raise
        except ClusterError as error:
            num_failures = num_failures + 1 if start.url == failed_start else 1
            failed_start = start.url
            if num_failures > config.max_restarts:
                raise

            run_log.report(" ".join(str(error).split()))  # Ray's messages have many lines
            run_log.report(
                "starting again from the last complete checkpoint "
                f"(restart {num_failures} from it; --max-restarts {config.max_restarts})"
            )
            attempt_log.mark_restart()
            start = StartPoint.find(config)
