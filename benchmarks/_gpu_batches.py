"""Steps of made-up tokens whose lengths are real ones, packed as a run packs them.

The lengths are those of 16,418 rows in the form of OpenHermes 2.5, in tokens of Qwen3 with its chat
template. Half of the tokens are trained: the answers, which stand last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.architecture.config import ModelShape
from miles.data.config import PackConfig
from miles.data.packing.micro_batch import micro_batch
from miles.data.packing.pack import pack, pack_stats
from miles.data.types import (
    MicroBatch,
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
)

LENGTHS = (
    *((0, 22), (1, 40), (2, 47), (5, 62), (10, 75), (20, 85), (30, 92), (40, 99), (50, 107)),
    *((60, 117), (70, 133), (75, 143), (80, 155), (85, 168), (90, 191), (93, 213), (95, 239)),
    *((97, 290), (98, 360), (99, 554), (99.5, 812), (99.9, 1243), (100, 11544)),
)
"""(percentile, tokens of a row)"""

TRAINED_SHARES = ((60, 0.32), (100, 0.30), (125, 0.45), (167, 0.59), (215, 0.73), (400, 0.85))
"""(tokens of a row, share of them that is trained)"""


@dataclass(frozen=True)
class MadeUpStep:
    """A step of one rank."""

    report: StepReport
    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_tokens(self) -> int:
        return self.report.content.num_tokens

    @property
    def num_causal_pairs(self) -> int:
        return self.report.content.num_causal_pairs


def draw_lengths(num_rows: int, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Return int32 [rows], lengths as OpenHermes has them, none above the capacity."""
    percentiles, tokens = np.array(LENGTHS).T
    lengths = np.interp(rng.random(num_rows) * 100, percentiles, tokens)
    return np.minimum(lengths, capacity).astype(np.int32)


def make_step(
    shape: ModelShape, *, capacity: int, num_micro_batches: int, seed: int, is_full: bool = False
) -> MadeUpStep:
    """Return a step that one rank trains on in some micro-batches.

    Args:
        capacity: tokens of a micro-batch.
        is_full: each micro-batch is one sample, as long as it.
    """
    rng = np.random.default_rng(seed)
    pack_config = PackConfig(dp_size=1, max_tokens_per_gpu=capacity)
    if is_full:
        lengths = np.full(num_micro_batches, capacity, np.int32)
    else:
        lengths = _fill(num_micro_batches * capacity, capacity, rng)
    # A few rows fewer, until they pack into the micro-batches.
    while len(pack(lengths, pack_config)[0]) > num_micro_batches:
        lengths = lengths[:-1]
    (packed,) = pack(lengths, pack_config)

    known_lengths, shares = np.array(TRAINED_SHARES).T
    trained = (np.interp(lengths, known_lengths, shares) * lengths).astype(int)
    ids = [rng.integers(0, shape.vocab_size, length).astype(np.int32) for length in lengths]
    masks = [_last(length, count) for length, count in zip(lengths, trained, strict=True)]

    batches = []
    for rows in packed:
        batch = micro_batch(
            np.concatenate([ids[row] for row in rows]),
            np.concatenate([masks[row] for row in rows]),
            lengths[rows],
            np.array(rows, np.int64),
            np.zeros(len(rows), np.int32),
        )
        batches.append(batch)

    stats = pack_stats(lengths, [packed], pack_config)
    report = _report(lengths, batches, StepPacking(stats.pack_fill, stats.dp_imbalance))
    return MadeUpStep(report, tuple(batches))


def _fill(num_tokens: int, capacity: int, rng: np.random.Generator) -> np.ndarray:
    """Return the lengths of as many rows as have some tokens in all."""
    lengths = draw_lengths(num_tokens // LENGTHS[0][1] + 1, capacity, rng)
    num_rows = int(np.searchsorted(np.cumsum(lengths), num_tokens, side="right"))
    return lengths[: max(num_rows, 1)]


def _last(length: int, count: int) -> np.ndarray:
    """Return a mask, uint8 [length], of the last tokens."""
    return (np.arange(length) >= length - count).astype(np.uint8)


def _report(lengths: np.ndarray, batches: list[MicroBatch], packing: StepPacking) -> StepReport:
    num_trained = int(sum(batch.loss_mask.sum() for batch in batches))
    wide = lengths.astype(np.int64)

    content = StepContent(
        num_samples=len(lengths),
        num_tokens=int(wide.sum()),
        num_causal_pairs=int((wide * (wide + 1) // 2).sum()),
        num_trained_tokens=num_trained,
        source_trained_tokens=(num_trained,),
        num_straddling_tokens=0,
        fingerprint="",
    )

    return StepReport(
        position=StepPosition(index=0, epoch=0.0, next_row=0),
        rows=StepRows(read=(len(lengths),), truncated=(0,), held_out=(0,), rejects=()),
        content=content,
        packing=packing,
        timing=StepTiming(stage_seconds={}),
    )
