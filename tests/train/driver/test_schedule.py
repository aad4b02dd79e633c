"""After which steps a run evaluates, saves and ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.train.config import EvalConfig, TrainConfig
from miles.train.driver.schedule import Schedule, StepActions


def actions(schedule: Schedule) -> dict[int, StepActions]:
    """After each number of steps of a run that nobody stops."""
    numbers = range(1, schedule.num_steps + 1)
    return {number: schedule.after(number, stop_requested=False) for number in numbers}


def saved(schedule: Schedule) -> list[int]:
    return [number for number, action in actions(schedule).items() if action.saves]


def evaluated(schedule: Schedule) -> list[int]:
    return [number for number, action in actions(schedule).items() if action.evaluates]


def test_the_example_in_the_docstring() -> None:
    schedule = Schedule(num_steps=10, save_interval=4, eval_interval=3)
    assert saved(schedule) == [4, 8, 10]
    assert evaluated(schedule) == [3, 6, 9, 10]


def test_without_intervals_only_the_last_step_counts() -> None:
    assert saved(Schedule(7)) == evaluated(Schedule(7)) == [7]


def test_compared_checkpoints_are_evaluated() -> None:
    schedule = Schedule(10, save_interval=4, eval_interval=3, compares_checkpoints=True)
    assert evaluated(schedule) == [3, 4, 6, 8, 9, 10]


def test_a_stop_saves_and_does_not_evaluate() -> None:
    schedule = Schedule(10, save_interval=4, eval_interval=1, compares_checkpoints=True)
    for num_done in range(1, 10):
        action = schedule.after(num_done, stop_requested=True)
        assert action == StepActions(is_last=False, is_stop=True, evaluates=False, saves=True)
        assert action.must_save


def test_a_stop_at_the_last_step_is_its_end() -> None:
    schedule = Schedule(10)
    assert schedule.after(10, stop_requested=True) == schedule.after(10, stop_requested=False)


@pytest.mark.parametrize("has_eval_set", [True, False])
@pytest.mark.parametrize("compares_checkpoints", [True, False])
@pytest.mark.parametrize("eval_interval", [None, 1, 2, 3])
@pytest.mark.parametrize("save_interval", [0, 1, 2, 3])
def test_every_combination(
    save_interval: int, eval_interval: int | None, compares_checkpoints: bool, has_eval_set: bool
) -> None:
    """The rules one by one, for every step of short runs."""
    for num_steps, stop_requested in product(range(1, 7), (False, True)):
        schedule = Schedule(
            num_steps, save_interval, has_eval_set, eval_interval, compares_checkpoints
        )
        for num_done in range(1, num_steps + 1):
            action = schedule.after(num_done, stop_requested=stop_requested)
            at_save = bool(save_interval) and num_done % save_interval == 0
            at_eval = eval_interval is not None and num_done % eval_interval == 0

            assert action.is_last == (num_done == num_steps)
            assert action.is_stop == (stop_requested and not action.is_last)
            assert action.saves == (action.is_last or action.is_stop or at_save)
            assert action.must_save == (action.is_last or action.is_stop)
            if not has_eval_set or action.is_stop:
                assert not action.evaluates
            else:
                at_checkpoint = action.saves and compares_checkpoints
                assert action.evaluates == (action.is_last or at_eval or at_checkpoint)


@pytest.mark.parametrize(("num_rollout", "num_steps"), [(None, 20), (5, 5), (20, 20), (30, 20)])
def test_the_settings_of_a_run_make_its_schedule(num_rollout: int | None, num_steps: int) -> None:
    data = DataConfig((SourceConfig("chat", ("chat.jsonl",)),), OrderConfig(), EncodeConfig("hf"))
    data = replace(data, held_out_fraction=0.1)
    more: dict[str, Any] = {"evaluation": EvalConfig(interval=3), "keep_best": 1}
    config = TrainConfig(
        "hf", "megatron", "run", data, save_interval=4, num_rollout=num_rollout, **more
    )
    assert Schedule.of(config, 20, has_eval_set=True) == Schedule(num_steps, 4, True, 3, True)
