"""The sequence of sources: golden, exact after each period, close to its shares everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.data.order.mixture import Mixture
from miles.errors import ConfigError


def test_golden_sequences() -> None:
    """Written out: if one changes, so does the order of every run that used it."""
    assert Mixture((3, 1)).sources(0, 9).tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert Mixture((2, 2, 1)).sources(0, 6).tolist() == [0, 1, 2, 0, 1, 0]
    assert Mixture((1,)).sources(5, 8).tolist() == [0, 0, 0]


weights_of_sources = st.lists(st.integers(1, 500), min_size=1, max_size=12).map(tuple)


@settings(max_examples=100, deadline=None)
@given(weights=weights_of_sources, begin=st.integers(0, 10**12), length=st.integers(1, 3_000))
def test_shares_are_kept_at_every_place(weights: tuple[int, ...], begin: int, length: int) -> None:
    mixture = Mixture(weights)
    sources = mixture.sources(begin, begin + length)
    before = mixture.counts(begin)
    counts = before + np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    assert np.array_equal(counts[-1], mixture.counts(begin + length))
    period = sum(weights)
    places = np.arange(begin + 1, begin + length + 1, dtype=object)  # whole numbers without end
    for source, weight in enumerate(weights):
        error = np.abs(counts[:, source].astype(object) * period - places * weight)
        assert error.max() <= period * len(weights) / 2
    assert mixture.counts(7 * period).tolist() == [7 * weight for weight in weights]


@pytest.mark.parametrize(
    ("weights", "integers"),
    [
        ((0.75, 0.25), (3, 1)),
        ((0.1, 0.2, 0.7), (1, 2, 7)),
        ((3, 1), (3, 1)),
        ((1_001_551, 517_982), (1_001_551, 517_982)),
        ((5.0,), (1,)),
        ((), ()),
        ((1e-3, 1), (1, 1000)),
    ],
)
def test_weights_count_as_they_are_written(
    weights: tuple[float, ...], integers: tuple[int, ...]
) -> None:
    assert OrderConfig(weights=weights).integer_weights == integers


@pytest.mark.parametrize(
    "weights", [(1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (float("inf"), 1.0)]
)
def test_weights_must_be_positive_numbers(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="--prompt-data-weights must be positive"):
        OrderConfig(weights=weights)


def test_weights_need_a_common_measure() -> None:
    with pytest.raises(
        ConfigError, match=r"--prompt-data-weights 0\.3333333333333333 0\.5 have no common measure"
    ):
        OrderConfig(weights=(1 / 3, 0.5))


def test_each_source_has_a_weight() -> None:
    sources = (SourceConfig("a", ("a",)), SourceConfig("b", ("b",)))
    with pytest.raises(ConfigError, match="gives 1 number for 2 sources: a, b"):
        DataConfig(sources, OrderConfig(weights=(1.0,)), EncodeConfig("t"))
