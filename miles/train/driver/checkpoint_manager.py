"""The driver's side of saving: one checkpoint at a time is on its way while the training goes on.

begin at step 100 ── poll after 101 ── poll after 102: all have written ── named in the tracker ── begin at 200
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miles.common import checkpoint_folder, storage
from miles.common.checkpoint_tracker import folder_name
from miles.errors import CheckpointError, ClusterError
from miles.train.config import TrainConfig
from miles.train.driver.group import TrainerGroup
from miles.train.driver.run_log import Journal
from miles.train.rank.checkpoint_writer import UPLOADED, WRITTEN

_POLL_SECONDS = 0.05


@dataclass
class _Pending:
    done: int
    """steps that it holds"""
    must: bool
    begun: float
    stall_seconds: float
    """for so long the training stood still"""
    is_uploading: bool = False


class Saves:
    """Begins checkpoints, and names each one in the tracker when all its files are there.

    Args:
        last: folder of the newest complete one so far.
        after: called with the steps of each that is complete.
    """

    def __init__(
        self,
        config: TrainConfig,
        group: TrainerGroup,
        journal: Journal,
        last: str,
        after: Callable[[int], None],
    ) -> None:
        self.last = last
        self._config, self._group, self._journal, self._after = config, group, journal, after
        self._pending: _Pending | None = None

    def begin(self, done: int, extra: dict[str, Any], *, must: bool) -> None:
        """Takes the state after `done` steps. Waits for the one before, where that is still on its way.

        Args:
            extra: JSON of the same moment, for `miles.json`.
            must: an error ends the run, whatever `--on-save-error` says: nothing comes after it.

        Raises:
            CheckpointError: this one or the one before failed, and that is to end the run.
        """
        self.wait()
        begun = time.perf_counter()
        problems = self._group.call("begin_save", self._config.save, done, extra)
        pending = _Pending(done, must, begun, time.perf_counter() - begun)
        if problems[0]:
            self._failed(pending, problems[0])
        else:
            self._pending = pending

    def poll(self) -> None:
        """To be called after every step.

        Raises:
            CheckpointError: as `begin`.
        """
        pending = self._pending
        if pending is None:
            return
        stages = self._group.call("save_stage")
        if not pending.is_uploading and all(stage == WRITTEN for stage in stages):
            if problem := self._group.call("seal_save")[0]:
                self._failed(pending, problem)
            elif storage.is_local(self._config.save):
                self._complete(pending)
            else:
                pending.is_uploading = True
        elif pending.is_uploading and all(stage == UPLOADED for stage in stages):
            if problem := next(filter(None, self._group.call("end_uploads")), ""):
                self._failed(pending, problem)
            else:
                self._complete(pending)

    def wait(self) -> None:
        """Until none is on its way.

        Raises:
            CheckpointError: as `begin`.
            ClusterError: it takes too long.
        """
        deadline = time.monotonic() + self._config.cluster.timeout_minutes * 60
        while self._pending is not None:
            self.poll()
            if self._pending is not None:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the checkpoint of step {self._pending.done} was not written within "
                        f"{self._config.cluster.timeout_minutes:g} minutes (--distributed-timeout-minutes); the last "
                        f"complete one is {self.last}"
                    )
                time.sleep(_POLL_SECONDS)

    def _complete(self, pending: _Pending) -> None:
        self._pending = None
        try:
            checkpoint_folder.publish(self._config.save, pending.done)
        except OSError as error:
            self._failed(pending, str(error))
            return
        self.last = storage.join(self._config.save, folder_name(pending.done))
        seconds = time.perf_counter() - pending.begun
        self._journal.say(
            f"checkpoint  {self.last}  ({seconds:.1f} s, of which the training waited {pending.stall_seconds:.1f})"
        )
        self._after(pending.done)

    def _failed(self, pending: _Pending, problem: str) -> None:
        self._pending = None
        said = (
            f"the checkpoint of step {pending.done} could not be written to {self._config.save}: {problem}; the last "
            f"complete one is {self.last}"
        )
        if pending.must or self._config.on_save_error == "end":
            raise CheckpointError(
                f"{said}. Make room and give the same command again: it goes on from there"
            )
        self._journal.say(f"{said}; the run goes on (--on-save-error continue)")
