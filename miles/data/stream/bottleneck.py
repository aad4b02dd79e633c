"""The bottleneck of a run: the trainers, a stage of the loader, or Ray.

    the time of 12 steps                                  seconds by stage           bottleneck
    6.0 s, 2.5 s of them waited; the loader was busy      encode 5.1, others 0.5     encode
    6.0 s, 2.5 s of them waited; the loader stood idle    encode 0.6, others 0.3     ray
    6.0 s, none of them waited                                                       trainer

A stage's seconds are those of one loader process. Where all stages together were busy for less than
half of the time, no process was: the steps wait for a free CPU, a transfer or the start of a
process, and more loader CPUs do not help.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from miles.common.counts import counted

TRAINER = "trainer"
RAY = "ray"
TOLERATED_WAIT = 0.02
"""A smaller share of the time is not called waiting."""
_BUSY = 0.5

_ADVICE = {
    "read": "the files are slow to read: bring them closer, write them anew with miles prepare, or "
    "raise --loader-cpus",
    "normalize": "raise --loader-cpus, or prepare the rows once with miles prepare",
    "encode": "raise --loader-cpus",
    "pack": "raise --loader-cpus",
    RAY: "the loader's processes stood idle: look for CPUs that something else has taken, a slow "
    "network, or an object store that is full",
}


@dataclass(frozen=True)
class Timing:
    """The timing of one step, seen from the trainer."""

    queue_depth: int
    wait_seconds: float
    step_seconds: float
    """from the step before to this one, the wait included"""
    stage_seconds: Mapping[str, float]


@dataclass(frozen=True)
class Bottleneck:
    """The timing of several steps together, and what it shows."""

    num_steps: int
    num_waited: int
    """steps for which the trainer had to wait"""
    wait_seconds: float
    total_seconds: float
    stage_seconds: Mapping[str, float]

    @classmethod
    def over(cls, timings: Iterable[Timing]) -> Bottleneck:
        """Return the sums over some steps."""
        steps = list(timings)
        stage_seconds = Counter[str]()
        for step in steps:
            stage_seconds.update(step.stage_seconds)
        return cls(
            num_steps=len(steps),
            num_waited=sum(step.queue_depth == 0 for step in steps),
            wait_seconds=sum((step.wait_seconds for step in steps), 0.0),
            total_seconds=sum((step.step_seconds for step in steps), 0.0),
            stage_seconds=dict(stage_seconds),
        )

    @property
    def waited_share(self) -> float:
        """The share of the time that the trainer waited."""
        return self.wait_seconds / self.total_seconds if self.total_seconds else 0.0

    @property
    def limiting(self) -> str:
        """The bottleneck: `TRAINER`, a stage of the loader, or `RAY`."""
        if self.waited_share <= TOLERATED_WAIT:
            return TRAINER
        if sum(self.stage_seconds.values()) < _BUSY * self.total_seconds:
            return RAY
        return max(self.stage_seconds, key=lambda stage: self.stage_seconds[stage])

    def __str__(self) -> str:
        text = (
            f"the trainers waited {self.wait_seconds:.2f} s of {self.total_seconds:.1f} s for data "
            f"({self.waited_share:.1%}); the queue was empty at {self.num_waited} of "
            f"{counted(self.num_steps, 'step')}. "
        )
        if self.limiting == TRAINER:
            return text + "The loader keeps up."
        if self.limiting == RAY:
            return text + f"The loader's stages were not busy: {_ADVICE[RAY]}."

        parts = [f"{stage} {seconds:.2f}" for stage, seconds in self.stage_seconds.items()]
        return text + (
            f"The loader limits this run, most of all its stage {self.limiting} "
            f"({', '.join(parts)} s): {_ADVICE[self.limiting]}."
        )
