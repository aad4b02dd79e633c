"""The steps after which a run evaluates, saves and ends: arithmetic on their numbers.

`Schedule(num_steps=10, save_interval=4, eval_interval=3)` after each number of completed steps:

    1  2  3         4     5  6         7  8     9         10
          evaluate  save     evaluate     save  evaluate  evaluate, save, end
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.train.config import TrainConfig
from miles.train.run_length import run_steps


@dataclass(frozen=True)
class StepActions:
    """The actions that follow a step."""

    is_last: bool
    """no step is left"""
    is_stop: bool
    """the run stops here although steps are left"""
    evaluates: bool
    saves: bool

    @property
    def must_save(self) -> bool:
        """Return whether a failed save ends the run whatever the settings: it was the last."""
        return self.is_last or self.is_stop


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, and those after which it evaluates and saves."""

    num_steps: int
    """steps of the whole run"""
    save_interval: int = 0
    """steps between checkpoints; 0: only after the last step"""
    has_eval_set: bool = True
    """False: it never evaluates"""
    eval_interval: int | None = None
    """steps between evaluations; None: only after the last step"""
    compares_checkpoints: bool = False
    """it evaluates each checkpoint, to keep the best ones"""

    @classmethod
    def of(cls, config: TrainConfig, num_data_steps: int, *, has_eval_set: bool) -> Schedule:
        """Return the schedule of a run.

        Args:
            num_data_steps: steps that the data has; `num_rollout` may be fewer.
            has_eval_set: there are rows to evaluate on.
        """
        return cls(
            run_steps(config, num_data_steps),
            config.save_interval,
            has_eval_set,
            config.evaluation.interval,
            config.keep_best is not None,
        )

    def after(self, num_done: int, *, stop_requested: bool) -> StepActions:
        """Return what follows once this number of steps is completed.

        Args:
            stop_requested: the run was asked to stop. It saves then, but does not evaluate.
        """
        is_last = num_done == self.num_steps
        is_stop = stop_requested and not is_last
        is_save_due = self.save_interval > 0 and num_done % self.save_interval == 0
        saves = is_last or is_stop or is_save_due

        is_eval_due = self.eval_interval is not None and num_done % self.eval_interval == 0
        is_compared = saves and self.compares_checkpoints
        evaluates = self.has_eval_set and not is_stop and (is_last or is_eval_due or is_compared)
        return StepActions(is_last, is_stop, evaluates, saves)
