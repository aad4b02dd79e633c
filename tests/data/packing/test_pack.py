"""Packing: every sample once, within the capacity, even over ranks, as few micro-batches as can
be."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import miles.data.packing.level
from miles.data.config import EncodeConfig, PackConfig, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.packing.pack import min_micro_batches, pack, pack_stats
from miles.data.rows.normalize import normalize
from miles.data.stream.stages import encoder_of
from miles.data.types import Encoded
from tests.support.packing_rules import packed_by_the_rules


def int32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def config_of(dp_size: int, capacity: int) -> PackConfig:
    return PackConfig(dp_size=dp_size, max_tokens_per_gpu=capacity)


def drawn_lengths(num_rows: int) -> np.ndarray:
    """Return lengths as in instruction data: most near 100 tokens, few of a thousand or far
    more."""
    generator = np.random.default_rng(5)
    short = generator.lognormal(4.68, 0.38, num_rows)
    long = generator.lognormal(6.0, 0.6, num_rows)
    lengths = np.where(generator.random(num_rows) < 0.03, long, short)
    return np.where(generator.random(num_rows) < 0.0002, lengths * 20, lengths).astype(np.int32) + 8


@pytest.fixture(scope="module", params=["drawn", "real"])
def row_lengths(request: pytest.FixtureRequest) -> np.ndarray:
    """int32 [rows]: lengths that steps are drawn from."""
    if request.param == "drawn":
        return drawn_lengths(16_384)
    assets: Path = request.getfixturevalue("assets")
    manifest = build_manifest(
        [SourceConfig("rows", (str(assets / "data/openhermes_sample.parquet"),))]
    )
    encoder = encoder_of(
        EncodeConfig(tokenizer=str(assets / "qwen3-tokenizer"), max_sample_tokens=1 << 20)
    )
    payloads = read_rows(manifest, np.arange(0, manifest.num_rows, 4))  # 4,105 are enough
    rows = encoder.encode_all(
        [normalize(payload, manifest.sources[0].format) for payload in payloads]
    )
    return int32([len(row.input_ids) for row in rows if isinstance(row, Encoded)])


def rank_tokens(lengths: np.ndarray, rank: list[list[int]]) -> int:
    return sum(int(lengths[sample]) for sample in chain.from_iterable(rank))


def all_samples(ranks: list[list[list[int]]]) -> list[int]:
    return sorted(chain.from_iterable(chain.from_iterable(ranks)))


def fullest_over_must(lengths: np.ndarray, ranks: list[list[list[int]]]) -> float:
    """Return tokens of the fullest rank / what it must hold: the mean, or the longest sample."""
    fullest = max(rank_tokens(lengths, rank) for rank in ranks)
    return fullest / max(lengths.sum() / len(ranks), lengths.max())


def test_the_examples_of_the_docstring() -> None:
    assert pack(int32([5, 4, 3, 3, 2, 1]), config_of(2, 6)) == [[[0], [3, 5]], [[2, 4], [1]]]
    assert pack(int32([9, 8, 6, 4, 4]), config_of(2, 20)) == [[[1, 3, 4]], [[0, 2]]]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    dp_size=st.integers(1, 9),
    capacity=st.integers(64, 200),
)
def test_every_sample_is_packed_once(lengths: list[int], dp_size: int, capacity: int) -> None:
    config = config_of(dp_size, capacity)
    ranks = pack(int32(lengths), config)
    assert len(ranks) == dp_size
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) >= min_micro_batches(int32(lengths), config)
    assert all_samples(ranks) == list(range(len(lengths)))
    for batch in chain.from_iterable(ranks):
        assert sum(lengths[sample] for sample in batch) <= capacity
    assert ranks == pack(int32(lengths), config)


@settings(max_examples=300, deadline=None)
@given(
    length_shares=st.lists(st.floats(0, 1), max_size=40),
    longest=st.sampled_from([3, 12, 100, 1 << 28]),
    room=st.sampled_from([1.0, 1.2, 3.0, 20.0]),
    dp_size=st.integers(1, 9),
)
def test_shortcuts_change_nothing(
    length_shares: list[float], longest: int, room: float, dp_size: int
) -> None:
    # Short lengths are equal in many ways; the longest need more than 64 bits for a load.
    lengths = [1 + int(share * (longest - 1)) for share in length_shares]
    capacity = int(longest * room)
    by_the_rules = packed_by_the_rules(lengths, dp_size, capacity)
    assert pack(int32(lengths), config_of(dp_size, capacity)) == by_the_rules


@pytest.mark.parametrize(
    "lengths",
    [[24, 30, 17, 12, 20, 7], [16, 11, 12, 27, 14, 29, 30, 17, 30, 13, 20, 2]],
    ids=["the best exchange does not fit", "half of the difference does not fit"],
)
def test_an_exchange_is_for_what_fits(lengths: list[int]) -> None:
    assert pack(int32(lengths), config_of(2, 30)) == packed_by_the_rules(lengths, 2, 30)


@pytest.mark.parametrize("capacity", [1024, 2048, 4096, 8192, 9216])
def test_ranks_are_level_with_few_micro_batches(row_lengths: np.ndarray, capacity: int) -> None:
    rows = row_lengths[row_lengths <= capacity]
    generator = np.random.default_rng(0)
    config = config_of(8, capacity)
    num_draws = 1_000
    num_over = 0
    for _ in range(num_draws):
        lengths = generator.choice(rows, 128, replace=False)
        ranks = pack(lengths, config)
        assert fullest_over_must(lengths, ranks) <= 1.02
        batches = list(chain.from_iterable(ranks))
        assert all_samples(ranks) == list(range(128))
        assert max(int(lengths[batch].sum()) for batch in batches) <= capacity
        assert {len(rank) for rank in ranks} == {len(ranks[0])}
        num_over += len(ranks[0]) > min_micro_batches(lengths, config)
    assert num_over <= num_draws * 0.01


def test_packs_a_hundred_thousand_lengths() -> None:
    """benchmarks/pack.py holds it to less than a second."""
    lengths = np.minimum(drawn_lengths(100_000), 8192)
    for dp_size in (8, 1024):
        config = config_of(dp_size, 8192)
        ranks = pack(lengths, config)
        assert len(ranks[0]) == min_micro_batches(lengths, config)
        assert fullest_over_must(lengths, ranks) <= 1.02


@pytest.mark.parametrize(("name", "value"), [("_MAX_TRIALS", 2), ("_MAX_OFFERS", 3)])
def test_limits_of_the_exchange_lose_no_sample(
    monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    generator = np.random.default_rng(0)
    config = config_of(8, 1024)
    steps = [
        np.minimum(drawn_lengths(16_384), 1024)[generator.integers(0, 16_384, 128)]
        for _ in range(200)
    ]
    unlimited = [pack(lengths, config) for lengths in steps]

    monkeypatch.setattr(miles.data.packing.level, name, value)
    limited = [pack(lengths, config) for lengths in steps]
    assert limited != unlimited

    for lengths, ranks in zip(steps, limited, strict=True):
        batches = list(chain.from_iterable(ranks))
        assert all_samples(ranks) == list(range(128))
        assert max(int(lengths[batch].sum()) for batch in batches) <= 1024


def test_gaps_are_filled_before_adding_micro_batches() -> None:
    # The emptiest bin first gives {3,2} {3,2} and no room for the last 2. With it, {3,2,2} {3,2}:
    # exchange 3 for 2.
    assert pack(int32([3, 3, 2, 2, 2]), config_of(1, 6)) == [[[0, 1], [2, 3, 4]]]

    # The same gives {7,3,3} {5,5,1}, and no exchange of one sample helps. The fullest bin first
    # does.
    assert pack(int32([7, 5, 5, 3, 3, 1]), config_of(2, 12)) == [[[0, 1]], [[2, 3, 4, 5]]]


def test_ranks_are_balanced_by_tokens_then_by_attention() -> None:
    generator = np.random.default_rng(3)
    config = config_of(8, 4096)
    for _ in range(20):
        lengths = generator.integers(20, 400, 128).astype(np.int32)
        assert pack_stats(lengths, pack(lengths, config), config).dp_imbalance < 1.01

    # Five samples, two ranks, equal tokens whoever gets the last one: it goes where attention
    # costs less.
    assert pack(int32([4, 2, 2, 1, 1]), config_of(2, 10)) == [[[0, 4]], [[1, 2, 3]]]

    # {6,3} {5,4,3}: 5 for 3 or 4 for 3 leave 11 and 10 tokens; attention costs 61 in {6,5}, at
    # most 52 in {6,4}.
    assert pack(int32([6, 5, 4, 3, 3]), config_of(2, 20)) == [[[0, 2]], [[1, 3, 4]]]


def test_ranks_are_balanced_not_micro_batches() -> None:
    # Five large samples ask for two micro-batches on each of four ranks. Spreading the rest evenly
    # over all micro-batches that are still empty would give the rank with the 90 as much as any
    # other: 130.
    lengths = int32([90, 60, 60, 60, 60, 20, 20, 20, 20, 20, 20])
    ranks = pack(lengths, config_of(4, 100))
    assert len(ranks[0]) == 2
    assert max(rank_tokens(lengths, rank) for rank in ranks) == 120


@pytest.mark.parametrize("lengths", [[], [5], [5, 4]])
def test_too_few_samples_leave_empty_micro_batches(lengths: list[int]) -> None:
    ranks = pack(int32(lengths), config_of(3, 8))
    assert [len(rank) for rank in ranks] == [1, 1, 1]
    assert sum(batch == [] for rank in ranks for batch in rank) == 3 - len(lengths)


def test_context_parallelism_widens_a_micro_batch() -> None:
    config = PackConfig(dp_size=1, max_tokens_per_gpu=10, context_parallel_size=2)
    assert pack(int32([12, 8]), config) == [[[0, 1]]]


def test_too_long_samples_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="longer than a micro-batch"):
        pack(int32([9]), config_of(1, 8))


def test_stats() -> None:
    config = config_of(2, 10)
    lengths = int32([6, 4, 5])
    stats = pack_stats(lengths, [[[0, 1]], [[2]]], config)
    assert stats.pack_fill == 15 / 20
    assert stats.dp_imbalance == 10 / 7.5
    empty = pack_stats(int32([]), [[[]], [[]]], config)
    assert (empty.pack_fill, empty.dp_imbalance) == (0.0, 1.0)
