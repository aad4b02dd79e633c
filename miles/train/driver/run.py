"""The records of a run: the parts that attempts share, an open attempt, the end of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from miles.architecture.config import ModelShape
from miles.data.stream.feed import Feed
from miles.train.config import TrainConfig
from miles.train.driver.attempts import AttemptLog
from miles.train.driver.evaluator import Evaluator
from miles.train.driver.folder_leases import FolderLeases
from miles.train.driver.group import TrainerGroup
from miles.train.driver.metrics import RunConstants
from miles.train.driver.metrics_log import MetricsLog
from miles.train.driver.preemption import StopSignal
from miles.train.driver.resume_state import ResumeState
from miles.train.driver.run_log import RunLog
from miles.train.driver.schedule import Schedule
from miles.train.estimate.preflight import Preflight
from miles.train.types import StartPoint


@dataclass(frozen=True)
class Run:
    """The parts of a run that all its attempts share."""

    config: TrainConfig
    console: Console
    run_log: RunLog
    attempt_log: AttemptLog
    stop_signal: StopSignal
    on_gpu: bool
    """each trainer has a GPU"""
    preflight: Preflight
    """what is known since before the start"""
    leases: FolderLeases

    @property
    def shape(self) -> ModelShape:
        return self.preflight.shape


@dataclass(frozen=True)
class AttemptData:
    """The data of an attempt, opened: enough to tell whether a step is left."""

    state: ResumeState
    evaluator: Evaluator | None
    feed: Feed
    schedule: Schedule

    @property
    def is_finished(self) -> bool:
        """Return whether no step is left to train."""
        return self.feed.first_step >= self.schedule.num_steps


@dataclass(frozen=True)
class Attempt:
    """An attempt that is ready for its first step."""

    run: Run
    start: StartPoint
    data: AttemptData
    group: TrainerGroup
    metrics_log: MetricsLog
    constants: RunConstants


@dataclass(frozen=True)
class RunSummary:
    """The end of a run."""

    num_steps: int
    """steps trained in the last attempt; 0: it was finished before, or stopped before the first"""
    first_loss: float
    """NaN without steps"""
    last_loss: float
    tokens_seen: int
    """trained tokens since the beginning of the run"""
    checkpoint: str
    """folder of the last checkpoint"""
    next_step: int
    is_finished: bool
    """no step is left; else a signal came, and the same call continues"""
    stopped_by: str | None = None
    """the signal, for the user"""

    @classmethod
    def of(
        cls,
        losses: Sequence[float],
        *,
        tokens_seen: int,
        checkpoint: str,
        next_step: int,
        is_finished: bool,
        stopped_by: str | None = None,
    ) -> RunSummary:
        """Return the summary of an attempt whose steps had these losses."""
        nan = float("nan")
        return cls(
            len(losses),
            losses[0] if losses else nan,
            losses[-1] if losses else nan,
            tokens_seen,
            checkpoint,
            next_step,
            is_finished,
            stopped_by,
        )
