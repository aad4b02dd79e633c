"""What can be known of the data before a run: files, windows, steps, the tokens of a sample. It needs no Ray."""

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
"""Rows of the sample, at most: from so many places of the set, evenly spaced, as many rows one after the other."""


@dataclass(frozen=True)
class Sample:
    """Rows of all places of the set, encoded."""

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
    """Counts the rows, plans the steps and encodes a sample.

    Raises:
        MilesError: what would keep the stream from opening.
    """
    encoder = stages.encoder_of(config.encode)
    manifest = build_manifest(config.sources)
    plan = stages.make_plan(manifest, config)
    windows = [plan.source_window_rows(source) for source in range(plan.num_sources)]
    require_small_groups(manifest, config.order.rounded_window_rows, windows)
    return Survey(manifest, plan, take_sample(manifest, config), dict(encoder.certificate.lines()))


def count_rows(sources: Sequence[SourceConfig]) -> int:
    """Rows of some sources."""
    return build_manifest(sources).num_rows


def packed_step(lengths: Int64, num_rows: int, config: PackConfig) -> tuple[int, int, float]:
    """A step of `num_rows` samples with these lengths, taken again and again where they are too few.

    Returns:
        its tokens, the micro-batches on each data rank, and the share of them that is filled.
    """
    of_step = np.resize(lengths, num_rows).astype(np.int32)
    packed = pack(of_step, config)
    return int(of_step.sum()), len(packed[0]), pack_stats(of_step, packed, config).pack_fill


def take_sample(manifest: Manifest, config: DataConfig) -> Sample:
    """Encodes rows from places that are evenly spaced over the set; the same ones every time.

    Raises:
        DataError: none of them can be used.
    """
    wanted = sample_rows(manifest.num_rows)
    formats, encoder = stages.source_formats(manifest), stages.encoder_of(config.encode)
    sources = manifest.source_of(wanted).tolist()
    lengths, trained, reasons = [], 0, Counter[str]()
    for payload, source in zip(read_rows(manifest, wanted), sources, strict=True):
        encoded = encode_row(payload, formats[source], encoder)
        if isinstance(encoded, RowRejected):
            reasons[encoded.reason] += 1
        else:
            lengths.append(len(encoded.input_ids))
            trained += int(encoded.loss_mask.sum())
    if not lengths:
        dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"none of {len(wanted)} sampled rows can be used: {dropped}; see --row-shape, --max-sample-tokens"
        )
    return Sample(len(wanted), np.array(lengths, np.int64), trained, reasons)


def sample_rows(num_rows: int) -> Int64:
    """int64 [rows], ascending: of 10 rows all; of 10,000 rows, 64 one after the other at each of 16 places."""
    if num_rows <= SAMPLE_ROWS:
        return np.arange(num_rows, dtype=np.int64)
    run = SAMPLE_ROWS // SAMPLE_PLACES
    begins = np.linspace(0, num_rows - run, SAMPLE_PLACES).astype(np.int64)
    return np.unique(begins[:, None] + np.arange(run))
