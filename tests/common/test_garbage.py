"""Python's collector looks less often for a while, and then as before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from miles.common.garbage import collecting_rarely


@pytest.fixture(params=[False, True], ids=["a user's process", "one that has frozen its objects"])
def has_frozen(request: pytest.FixtureRequest) -> Iterator[bool]:
    gc.unfreeze()
    if request.param:
        gc.freeze()
    yield request.param
    gc.freeze()  # as it is for the other tests


def test_everything_is_as_before(has_frozen: bool) -> None:
    thresholds = gc.get_threshold()
    with collecting_rarely():
        assert gc.get_threshold() > thresholds
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == thresholds
    assert (gc.get_freeze_count() > 0) == has_frozen
