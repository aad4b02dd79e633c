"""The driver's side of saving: one checkpoint at a time is written while the training continues.

begin at step 100 -- poll after 101 -- poll after 102: all have written, it is named in the tracker
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.common import storage
from miles.common.checkpoint_tracker import folder_name, write_tracker
from miles.common.file_errors import cause_in
from miles.errors import LostError, MilesError, WriteError
from miles.train.config import TrainConfig
from miles.train.driver.group import TrainerGroup
from miles.train.driver.run_log import RunLog
from miles.train.types import SaveFailure, SaveStage

_POLL_SECONDS = 0.05


@dataclass
class _PendingCheckpoint:
    """A checkpoint that is being written."""

    iteration: int
    """steps that it holds"""
    must_succeed: bool
    begun: float
    """`time.perf_counter()` of its beginning"""
    stall_seconds: float
    """how long the training stood still"""
    is_uploading: bool = False


class CheckpointManager:
    """Begins checkpoints, and names each one in the tracker when all its files are there.

    Args:
        newest: folder of the newest complete checkpoint so far.
        on_complete: called with the iteration of each checkpoint that becomes complete.
    """

    def __init__(
        self,
        config: TrainConfig,
        group: TrainerGroup,
        run_log: RunLog,
        newest: str,
        on_complete: Callable[[int], None],
    ) -> None:
        self.newest = newest
        self._config = config
        self._group = group
        self._run_log = run_log
        self._on_complete = on_complete
        self._pending: _PendingCheckpoint | None = None

    def begin(self, iteration: int, extra: dict[str, Any], *, must_succeed: bool) -> bool:
        """Begin a checkpoint of this moment; wait first for the one before it.

        Args:
            iteration: steps that it holds.
            extra: JSON of the same moment, for `miles.json`.
            must_succeed: a failure ends the run, whatever `--on-save-error` says.

        Returns:
            whether it was begun: False where `--on-save-error` leaves it out.

        Raises:
            WriteError: this one or the one before failed, and that ends the run.
            LostError: a rank was lost, or the one before took too long.
        """
        self.wait()
        storage.require_held(self._config.save)
        begun = time.perf_counter()
        failure = self._group.begin_save(self._config.save, iteration, extra)
        stall_seconds = time.perf_counter() - begun
        pending = _PendingCheckpoint(iteration, must_succeed, begun, stall_seconds)
        if failure is not None:
            self._fail(pending, failure)
            return False
        self._pending = pending
        return True

    def poll(self) -> None:
        """Take the pending checkpoint one stage further if it is ready. Call it after every step.

        Raises:
            WriteError: it failed, and that ends the run.
            LostError: a rank was lost.
        """
        pending = self._pending
        if pending is None:
            return

        stages = set(self._group.save_stages())
        if not pending.is_uploading and stages == {SaveStage.WRITTEN}:
            self._seal(pending)
        elif pending.is_uploading and stages == {SaveStage.UPLOADED}:
            failure = self._group.finish_uploads()
            if failure is not None:
                self._fail(pending, failure)
            else:
                self._complete(pending)

    def wait(self) -> None:
        """Wait until no checkpoint is pending.

        Raises:
            WriteError: it failed, and that ends the run.
            LostError: a rank was lost, or it takes too long.
        """
        timeout_minutes = self._config.cluster.timeout_minutes
        deadline = time.monotonic() + timeout_minutes * 60

        while self._pending is not None:
            self.poll()
            if self._pending is None:
                return
            if time.monotonic() > deadline:
                raise LostError(
                    f"the checkpoint of step {self._pending.iteration} was not written within "
                    f"{timeout_minutes:g} minutes (--distributed-timeout-minutes); the last "
                    f"complete one is {self.newest}"
                )
            time.sleep(_POLL_SECONDS)

    def _seal(self, pending: _PendingCheckpoint) -> None:
        storage.require_held(self._config.save)  # the ranks give the checkpoint its name
        failure = self._group.seal_save()
        if failure is not None:
            self._fail(pending, failure)
        elif storage.is_local(self._config.save):
            self._complete(pending)
        else:
            pending.is_uploading = True

    def _complete(self, pending: _PendingCheckpoint) -> None:
        """Name the checkpoint in the tracker, and report it."""
        self._pending = None
        try:
            write_tracker(self._config.save, pending.iteration)
        except MilesError as error:
            self._fail(pending, SaveFailure(str(error)))
            return

        self.newest = storage.join(self._config.save, folder_name(pending.iteration))
        seconds = time.perf_counter() - pending.begun
        self._run_log.report(
            f"checkpoint  {self.newest}  ({seconds:.1f} s, of which the training waited "
            f"{pending.stall_seconds:.1f})"
        )
        self._on_complete(pending.iteration)

    def _fail(self, pending: _PendingCheckpoint, failure: SaveFailure) -> None:
        """Report that a checkpoint failed.

        Raises:
            WriteError: the failure ends the run.
        """
        self._pending = None
        text = (
            f"the checkpoint of step {pending.iteration} could not be written to "
            f"{self._config.save}: {failure.reason}; the last complete one is {self.newest}"
        )
        if pending.must_succeed or self._config.on_save_error == "end":
            cause = cause_in(failure.reason)
            remedy = failure.remedy or (cause.repair if cause else "")
            what_to_do = f"{remedy}, then give" if remedy else "Give"
            raise WriteError(f"{text}. {what_to_do} the same command again: it goes on from there")
        self._run_log.report(f"{text}; the run goes on (--on-save-error continue)")
