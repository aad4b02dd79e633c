"""The attempts of a run: restarts after a loss, and the log of all attempts.

`starts.jsonl` in the run folder has every beginning of an attempt with its reason, and every end
that could be noted:

{"start": 1, "time": "…", "reason": "new run", "first_step": 0, "checkpoint": "…/release", …,
 "first_checkpoint": 100}
{"end": 1, "time": "…", "how": "SIGTERM", "next_step": 137}
{"start": 2, "time": "…", "reason": "the same command again, after SIGTERM", "first_step": 137, …}
{"start": 3, "time": "…", "reason": "the same command again; start 2 has no end: it was killed", …}
{"end": 3, "time": "…", "how": "LostError: trainer 1 died …", "next_step": 150, "restarts": true}
{"not_begun": "LostError: the feed died …", "time": "…", "next_step": 137, "restarts": true}

The last line is of an attempt that failed before it was entered as a start.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from ray.exceptions import RayError

from miles import __version__
from miles.common import remote_errors, run_folder, storage
from miles.common.patient_file import PatientFile, Report
from miles.common.redact import redact
from miles.common.run_record import FIRST_CHECKPOINT
from miles.errors import LostError, MilesError, RunError
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

    def begin(
        self,
        first_step: int,
        checkpoint: str,
        layout: Layout,
        precision: Precision,
        surroundings: Mapping[str, Any] | None = None,
    ) -> str:
        """Enter the beginning of an attempt; return its reason.

        Args:
            surroundings: of the attempt, further keys of its entry (`driver.surroundings`).
        """
        reason = self._reason(first_step)

        self._add(
            {
                "start": self.num_attempts + 1,
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
                **(surroundings or {}),
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
        """Enter how the last attempt ended, and the first step that it did not train.

        An end that is entered already stays alone: a finished run is asked again.
        """
        last = self._entries[-1] if self._entries else {}
        if "end" in last and (last["how"], last["next_step"]) == (redact(how), next_step):
            return
        self._add(
            {
                "end": self.num_attempts,
                "time": time_now(),
                "how": redact(how),
                "next_step": next_step,
            }
        )

    def fail(self, error: BaseException, next_step: int, *, has_begun: bool) -> None:
        """Enter an attempt's failure, unless `end` has.

        A failure to write it is not raised: the error that it tells of comes first.

        Args:
            next_step: where the attempt began, or was to begin.
            has_begun: its beginning is entered.
        """
        how = redact(_kind_and_text(error))
        with contextlib.suppress(MilesError):
            if not has_begun:
                self._add({"not_begun": how, "time": time_now(), "next_step": next_step})
            elif "start" in self._entries[-1]:
                self.end(how, next_step)

    def mark_restart(self) -> None:
        """Note at the last failure that the driver itself starts another attempt."""
        if not self._entries or "start" in self._entries[-1]:
            return
        self._entries[-1]["restarts"] = True
        with contextlib.suppress(MilesError):
            self._write()

    @property
    def is_restarting(self) -> bool:
        """Return whether the next attempt is a restart: part of a run that is under way."""
        return bool(self._entries) and "restarts" in self._entries[-1]

    @property
    def num_attempts(self) -> int:
        """Return how many beginnings are entered, of all commands."""
        return sum("start" in entry for entry in self._entries)

    def _reason(self, first_step: int) -> str:
        last = self._entries[-1] if self._entries else {}
        how = last.get("how", last.get("not_begun"))
        if last.get("restarts"):
            return f"restarted after {how}"
        if not self.num_attempts:
            return "new run" if first_step == 0 else "continues a checkpoint of another folder"
        if "start" in last:
            return f"the same command again; start {last['start']} has no end: it was killed"
        return f"the same command again, after {how}"

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
    from the same one. Only a `LostError` is followed by another attempt.

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
            return _judged(partial(attempt, start), start, config.run_dir, run_log, attempt_log)
        except LostError as error:
            num_failures = num_failures + 1 if start.url == failed_start else 1
            failed_start = start.url
            if num_failures > config.max_restarts:
                raise _lost_too_often(error, config.max_restarts) from error.__cause__

            run_log.report(" ".join(str(error).split()))
            run_log.report(
                "starting again from the last complete checkpoint "
                f"(restart {num_failures} from it; --max-restarts {config.max_restarts})"
            )
            attempt_log.mark_restart()
        start = StartPoint.find(config)


def _judged(
    attempt: Callable[[], T],
    start: StartPoint,
    run_dir: str,
    run_log: RunLog,
    attempt_log: AttemptLog,
) -> T:
    """Make an attempt; enter its failure, which becomes a `MilesError` where Ray raised it."""
    num_before = attempt_log.num_attempts
    try:
        try:
            return attempt()
        except RayError as error:  # in the driver itself: an actor that cannot be started, say
            raise remote_errors.judge(error).as_error("Ray failed") from error
    except Exception as error:
        has_begun = attempt_log.num_attempts > num_before
        attempt_log.fail(error, start.next_step, has_begun=has_begun)
        if isinstance(error, RunError) and error.remote_stack:
            run_log.write(f"traceback of the process that failed:\n{error.remote_stack}")
            path = storage.join(run_dir, run_folder.RUN_LOG)
            error.args = (f"{error}. Its traceback is in {path}",)
        raise


def _lost_too_often(error: LostError, max_restarts: int) -> LostError:
    """Return the error that ends a run after its last restart."""
    return LostError(
        f"{error}. No restart is left (--max-restarts {max_restarts} from one checkpoint); the same "
        "command goes on from the last complete checkpoint"
    )


def _kind_and_text(error: BaseException) -> str:
    """Return an error's class and text on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
