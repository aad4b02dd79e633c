"""A look at the data before a run, without Ray: files, windows, steps, tokens of a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miles.data.config import DataConfig, PackConfig, SourceConfig
from miles.data.files.group_sizes import require_small_groups
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.data.order.plan import Plan
from miles.data.packing.pack import pack, pack_stats
from miles.data.stream import stages
from miles.data.stream.row_outcomes import encode_row
from miles.data.types import Int64, RowRejected
from miles.errors import DataError

SAMPLE_PLACES = 16
SAMPLE_ROWS = 1_024
"""Rows of the sample, at most: a stretch from each of `SAMPLE_PLACES` places, evenly spaced."""


@dataclass(frozen=True)
class Sample:
    """The encoded rows of a sample, spread over the whole set."""

    num_rows: int
    lengths: Int64
    """int64 [samples], in tokens"""
    num_trained_tokens: int
    reasons: Counter[str]
    """why rows were dropped"""


@dataclass(frozen=True)
class Survey:
    """The files of a run, the plan over them, and a sample of their rows."""

    manifest: Manifest
    plan: Plan
    sample: Sample
    certificate: dict[str, str]
    """what is proven of the tokenizer, line by line"""


def survey(config: DataConfig) -> Survey:
    """Count the rows, plan the steps and encode a sample.

    Raises:
        MilesError: the stream could not be opened either.
    """
    encoder = stages.encoder_of(config.encode)
    manifest = build_manifest(config.sources)
    plan = stages.make_plan(manifest, config)
    windows = [plan.source_window_rows(source) for source in range(plan.num_sources)]
    require_small_groups(manifest, config.order.rounded_window_rows, windows)
    return Survey(manifest, plan, take_sample(manifest, config), dict(encoder.certificate.lines()))


def count_rows(sources: Sequence[SourceConfig]) -> int:
    """Return how many rows some sources have."""
    return build_manifest(sources).num_rows


def packed_step(lengths: Int64, num_rows: int, config: PackConfig) -> tuple[int, int, float]:
    """Pack a step of `num_rows` samples with these lengths, repeated where they are too few.

    Returns:
        Its tokens, the micro-batches on each data rank, and the share of them that is filled.
    """
    of_step = np.resize(lengths, num_rows).astype(np.int32)
    packed = pack(of_step, config)
    return int(of_step.sum()), len(packed[0]), pack_stats(of_step, packed, config).pack_fill


def take_sample(manifest: Manifest, config: DataConfig) -> Sample:
    """Encode rows from places that are evenly spaced over the set; the same rows every time.

    Raises:
        DataError: none of them can be used.
    """
    row_ids = sample_rows(manifest.num_rows)
    sources = manifest.source_of(row_ids).tolist()
    formats = stages.source_formats(manifest)
    encoder = stages.encoder_of(config.encode)
    lengths: list[int] = []
    num_trained_tokens = 0
    reasons = Counter[str]()

    for payload, source in zip(read_rows(manifest, row_ids), sources, strict=True):
        result = encode_row(payload, formats[source], encoder)
        if isinstance(result, RowRejected):
            reasons[result.reason] += 1
        else:
            lengths.append(len(result.input_ids))
            num_trained_tokens += int(result.loss_mask.sum())

    if not lengths:
        dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"none of {len(row_ids)} sampled rows can be used: {dropped}; see --row-shape, "
            "--max-sample-tokens"
        )
    return Sample(len(row_ids), np.array(lengths, np.int64), num_trained_tokens, reasons)


def sample_rows(num_rows: int) -> Int64:
    """Return the rows of the sample: int64 [rows], ascending.

    All of 10 rows; of 10,000 rows, stretches of 64 at each of 16 places.
    """
    if num_rows <= SAMPLE_ROWS:
        return np.arange(num_rows, dtype=np.int64)
    run = SAMPLE_ROWS // SAMPLE_PLACES
    begins = np.linspace(0, num_rows - run, SAMPLE_PLACES).astype(np.int64)
    return np.unique(begins[:, None] + np.arange(run))
