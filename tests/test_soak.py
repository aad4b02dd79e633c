"""The soak's own parts, without a run: what it draws, what it counts as a loss, the bad days of S3."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import s3fs

from benchmarks import _soak_storage
from benchmarks._soak_job import Outcome, Plan, num_rows_apart
from benchmarks._soak_storage import FAILURES, object_store
from benchmarks.soak import Soak
from miles.common import storage


def test_a_seed_draws_the_same_jobs() -> None:
    plans = [Plan.draw(7, number, may_mount=True) for number in range(20)]
    assert plans == [Plan.draw(7, number, may_mount=True) for number in range(20)]
    assert len({str(plan) for plan in plans}) == 20
    assert not any(plan.on_small_disk for plan in map(_without_mounts, range(20)))


def _without_mounts(number: int) -> Plan:
    return Plan.draw(7, number, may_mount=False)


@pytest.mark.parametrize(
    "loss",
    [
        {"rows_lost": 1},
        {"steps_lost": 1},
        {"differences": ["job 0: weights"]},
        {"unexpected": ["job 0: traceback"]},
        {"is_finished": False},
    ],
)
def test_any_loss_is_shown_and_counts(tmp_path: Path, loss: dict[str, object]) -> None:
    soak = Soak(tmp_path, 7)
    plan = Plan.draw(7, 0, may_mount=False)
    well = Outcome(plan, num_commands=3, struck=Counter({"kill: driver": 2}), is_finished=True)
    soak.enter(well)
    assert not soak.has_losses

    flags = {"is_finished": True, **loss}
    soak.enter(Outcome(plan, struck=Counter({"kill: driver": 1}), **flags))  # type: ignore[arg-type]
    assert soak.has_losses
    soak.show()
    table = (tmp_path / "soak.txt").read_text()
    assert "kill: driver" in table
    survived = next(line for line in table.splitlines() if "all faults" in line)
    assert [word for word in survived.split() if word.isdigit()] == ["3", "2"]


def test_rows_apart_are_counted() -> None:
    expected = {"chat": {"counts": {"read": 10, "trained": 8}}}
    assert num_rows_apart(expected, expected) == 0
    assert num_rows_apart({"chat": {"counts": {"read": 9, "trained": 8}}}, expected) == 1
    assert num_rows_apart({}, expected) == 18


def test_storage_outlasts_bad_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of failure came, and what was written is there."""
    monkeypatch.setattr(_soak_storage, "SHARE_IN_CALM", 0.4)
    monkeypatch.setattr(_soak_storage, "SLOW_SECONDS", 0.05)
    monkeypatch.setattr("miles.common.retry.FIRST_PAUSE_SECONDS", 0.01)
    with object_store(random.Random(3)) as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store.weather.is_on = True
        for number in range(24):
            url = f"s3://soak/{number}.json"
            storage.write_text(url, json.dumps(number))
            assert storage.read_text(url) == json.dumps(number) == store.read(url).decode()
        s3fs.S3FileSystem.clear_instance_cache()
        assert set(store.weather.counts) == set(FAILURES)
