"""Steps and what was waited for them -> what keeps the run back: the trainers, the loader's slowest stage, or Ray.

    12 steps in 6.0 s, 2.5 s of them waited; read 0.2, normalize 0.4, encode 5.1, pack 0.1 s   ->  encode
    12 steps in 6.0 s, 2.5 s of them waited; read 0.1, normalize 0.1, encode 0.6, pack 0.1 s   ->  ray
    12 steps in 6.0 s, none of them waited                                                     ->  trainer

A stage's seconds are those of one loader process. Where all stages together were busy for less than half of the time,
no process was: the steps wait for a free CPU, a transfer or the start of a process, and more loader CPUs do not help.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TRAINER, RAY = "trainer", "ray"
TOLERATED_WAIT = 0.02
"""A smaller share of the time is not called waiting."""
_BUSY = 0.5

_ADVICE = {
    "read": "the files are slow to read: bring them closer, write them anew with miles prepare, or raise --loader-cpus",
    "normalize": "raise --loader-cpus, or prepare the rows once with miles prepare",
    "encode": "raise --loader-cpus",
    "pack": "raise --loader-cpus",
    RAY: "the loader's processes stood idle: look for CPUs that something else has taken, a slow network, or an object "
    "store that is full",
}


@dataclass(frozen=True)
class Timing:
    """One step, seen from the trainer."""

    queue_depth: int
    wait_seconds: float
    step_seconds: float
    """from the step before to this one, the wait included"""
    stage_seconds: Mapping[str, float]


@dataclass(frozen=True)
class Stall:
    """What a number of steps say together."""

    num_steps: int
    num_waited: int
    """steps for which the trainer had to wait"""
    wait_seconds: float
    total_seconds: float
    stage_seconds: Mapping[str, float]

    @classmethod
    def over(cls, timings: Iterable[Timing]) -> Stall:
        num_steps = num_waited = 0
        wait_seconds = total_seconds = 0.0
        stages = Counter[str]()
        for timing in timings:
            num_steps, num_waited = num_steps + 1, num_waited + (timing.queue_depth == 0)
            wait_seconds, total_seconds = (
                wait_seconds + timing.wait_seconds,
                total_seconds + timing.step_seconds,
            )
            stages.update(timing.stage_seconds)
        return cls(num_steps, num_waited, wait_seconds, total_seconds, dict(stages))

    @property
    def waited_share(self) -> float:
        """of the time"""
        return self.wait_seconds / self.total_seconds if self.total_seconds else 0.0

    @property
    def limiting(self) -> str:
        """`TRAINER`, a stage of the loader, or `RAY`."""
        if self.waited_share <= TOLERATED_WAIT:
            return TRAINER
        if sum(self.stage_seconds.values()) < _BUSY * self.total_seconds:
            return RAY
        return max(self.stage_seconds, key=lambda stage: self.stage_seconds[stage])

    def __str__(self) -> str:
        text = (
            f"the trainers waited {self.wait_seconds:.2f} s of {self.total_seconds:.1f} s for data "
            f"({self.waited_share:.1%}); the queue was empty at {self.num_waited} of {self.num_steps} steps. "
        )
        if self.limiting == TRAINER:
            return text + "The loader keeps up."
        if self.limiting == RAY:
            return text + f"The loader's stages were not busy: {_ADVICE[RAY]}."
        seconds = ", ".join(
            f"{stage} {seconds:.2f}" for stage, seconds in self.stage_seconds.items()
        )
        return text + (
            f"The loader limits this run, most of all its stage {self.limiting} ({seconds} s): "
            f"{_ADVICE[self.limiting]}."
        )
