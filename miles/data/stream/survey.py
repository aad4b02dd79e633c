"""A look at the data before a run, without Ray: files, windows, steps, and a sample of the rows.

    CountedStream -> rows from places spread over the set -> encoded here -> lengths, rejects

The sample is judged as the run will judge its rows, as far as it can tell: of a set that it covers
it says the same, of a larger one only that no row of it can be used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from miles.common.counts import counted
from miles.data.config import DataConfig, PackConfig
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.data.packing.pack import pack, pack_stats
from miles.data.stream import eval_rows, stages
from miles.data.stream.account import advice
from miles.data.stream.counted_stream import CountedStream
from miles.data.stream.reject_limits import LENGTH_FLAGS, RejectLimits, describe_rejects
from miles.data.stream.row_outcomes import row_outcomes
from miles.data.types import Int64, Reject, RowRejected
from miles.data.unused_names import count_row
from miles.errors import DataError

SAMPLE_PLACES = 16
SAMPLE_ROWS = 1_024
"""Rows of the sample, at most: a stretch from each of `SAMPLE_PLACES` places, evenly spaced."""
SAMPLE_BYTES = 8 << 20
"""Bytes of the rows that are encoded, about: the start of a run waits for them."""
READ_ROWS = 1 << 17
"""Rows of the row groups that are read for the sample, about; a row group is read as a whole."""


@dataclass(frozen=True)
class Sample:
    """The encoded rows of a sample, spread over the whole set."""

    num_rows: int
    lengths: Int64
    """int64 [samples], in tokens"""
    num_trained_tokens: int
    rejects: tuple[Reject, ...]
    """of the rows that are trained on"""
    num_held_out: int
    """rows that are held out for evaluation"""
    held_out_rejects: tuple[Reject, ...]
    is_whole: bool
    """every row of the set is in it"""
    unused_keys: Mapping[str, Mapping[str, int]]
    """source name -> key of messages that nothing reads -> rows of the sample that have it"""

    @property
    def reasons(self) -> Counter[str]:
        """Return why rows were dropped, and how many for each reason."""
        return Counter(reject.reason for reject in (*self.rejects, *self.held_out_rejects))


@dataclass(frozen=True)
class Survey:
    """The stream of a run, counted, and a sample of its rows."""

    stream: CountedStream
    sample: Sample
    certificate: dict[str, str]
    """what is proven of the tokenizer, line by line"""


@dataclass(frozen=True)
class EvalSurvey:
    """The rows of `--eval-prompt-data`, counted, and a sample of them."""

    manifest: Manifest
    sample: Sample


def survey(config: DataConfig, stream: CountedStream, num_steps: int) -> Survey:
    """Encode a sample of the training rows, and judge it.

    Args:
        config: of the training stream.
        stream: of this configuration.
        num_steps: of the run.

    Raises:
        DataError: no row can be used; or the sample is the whole set, the run reads all of it, and
            more rows are dropped than the limits allow.
        SourceError: rows that cannot be read.
    """
    config = replace(config, encode=stream.encode)
    sample = take_sample(stream.manifest, config)
    _require_samples(sample, stream.manifest)

    reads_all = num_steps >= stream.plan.steps_per_epoch and not config.order.weights
    if sample.is_whole and reads_all and not config.order.drop_last:
        _judge(sample, config, stream.manifest)
    if sample.is_whole and config.held_out_fraction:
        _require_held_out(sample, config, stream.manifest)
    certificate = dict(stages.encoder_of(config.encode).certificate.lines())
    return Survey(stream, sample, certificate)


def survey_eval(config: DataConfig) -> EvalSurvey:
    """Count the rows of sources for evaluation, and judge a sample of them.

    Args:
        config: of `eval_config`, with sources of its own.

    Raises:
        DataError: no row can be used; or the sample is the whole set, and more rows are dropped
            than the limits allow.
        SourceError: a source that cannot be used.
    """
    manifest = build_manifest(config.sources)
    sample = take_sample(manifest, config)
    if not len(sample.lengths):
        raise eval_rows.nothing_to_evaluate(sample.rejects, sample.num_rows, config, manifest)
    if sample.is_whole:
        eval_rows.require_usable(sample.rejects, sample.num_rows, config, manifest)
    return EvalSurvey(manifest, sample)


def packed_step(lengths: Int64, num_rows: int, config: PackConfig) -> tuple[int, int, float]:
    """Pack a step of `num_rows` samples with these lengths, repeated where they are too few.

    Returns:
        Its tokens, the micro-batches on each data rank, and the share of them that is filled.
    """
    of_step = np.resize(lengths, num_rows).astype(np.int32)
    packed = pack(of_step, config)
    return int(of_step.sum()), len(packed[0]), pack_stats(of_step, packed, config).pack_fill


def take_sample(manifest: Manifest, config: DataConfig) -> Sample:
    """Encode rows from places that are spread over the set; the same rows every time."""
    row_ids = spread(quick_rows(manifest, sample_rows(manifest.num_rows)))
    encoder = stages.encoder_of(config.encode)
    payloads = _limited(read_rows(manifest, row_ids))
    num_rows = len(payloads)
    row_ids = row_ids[:num_rows]
    sources = manifest.source_of(row_ids).tolist()
    source_formats = stages.source_formats(manifest)
    formats = [source_formats[source] for source in sources]

    lengths: list[int] = []
    num_trained_tokens = 0
    num_held_out = 0
    rejects: list[Reject] = []
    held_out_rejects: list[Reject] = []
    unused_keys: dict[str, dict[str, int]] = {name: {} for name in manifest.source_names}
    outcomes = row_outcomes(payloads, formats, encoder, config.held_out_fraction)
    for row_id, source, outcome in zip(row_ids.tolist(), sources, outcomes, strict=True):
        num_held_out += outcome.is_held_out
        result = outcome.result
        if isinstance(result, RowRejected):
            of_row = held_out_rejects if outcome.is_held_out else rejects
            of_row.append(Reject(row_id, source, result.reason, result.detail))
        else:
            lengths.append(len(result.input_ids))
            num_trained_tokens += int(result.loss_mask.sum())
        if outcome.unused_keys:
            count_row(unused_keys[manifest.source_names[source]], outcome.unused_keys)

    return Sample(
        num_rows,
        np.array(lengths, np.int64),
        num_trained_tokens,
        tuple(sorted(rejects, key=lambda reject: reject.row_id)),
        num_held_out,
        tuple(sorted(held_out_rejects, key=lambda reject: reject.row_id)),
        is_whole=num_rows == manifest.num_rows,
        unused_keys=unused_keys,
    )


def _limited(payloads: Sequence[bytes]) -> Sequence[bytes]:
    """Return the first rows, up to the one that goes beyond `SAMPLE_BYTES`."""
    num_bytes = 0
    for row, payload in enumerate(payloads):
        num_bytes += len(payload)
        if num_bytes > SAMPLE_BYTES:
            return payloads[: row + 1]
    return payloads


def sample_rows(num_rows: int) -> Int64:
    """Return the rows of the sample: int64 [rows], ascending.

    All of 10 rows; of 10,000 rows, stretches of 64 at each of 16 places.
    """
    if num_rows <= SAMPLE_ROWS:
        return np.arange(num_rows, dtype=np.int64)
    run = SAMPLE_ROWS // SAMPLE_PLACES
    begins = np.linspace(0, num_rows - run, SAMPLE_PLACES).astype(np.int64)
    return np.unique(begins[:, None] + np.arange(run))


def spread(row_ids: Int64) -> Int64:
    """Return rows in an order of which every beginning is spread over all of them.

    0 1 2 3 4 5 6 7  ->  0 4 2 6 1 5 3 7
    """
    num_bits = max(len(row_ids) - 1, 1).bit_length()
    places = np.arange(1 << num_bits)
    reversed_places = np.zeros_like(places)
    for bit in range(num_bits):
        reversed_places |= (places >> bit & 1) << (num_bits - 1 - bit)
    order: Int64 = row_ids[reversed_places[reversed_places < len(row_ids)]]
    return order


def quick_rows(manifest: Manifest, row_ids: Int64) -> Int64:
    """Return those of some rows for which no more than about `READ_ROWS` rows have to be read.

    Of files with large row groups, fewer places of the set are looked at.

    Args:
        row_ids: int64 [rows], ascending.
    """
    groups = np.searchsorted(manifest.group_starts, row_ids, side="right") - 1
    num_read = 0
    taken: list[int] = []
    units: set[str] = set()

    for group in spread(np.unique(groups)).tolist():
        _, file, number = manifest.group_location(group)
        # A compressed file is read from its start.
        is_compressed = file.compression is not None
        unit = file.path if is_compressed else f"{file.path}:{number}"
        if unit not in units:
            num_unit_rows = file.num_rows if is_compressed else file.row_groups[number].num_rows
            if units and num_read + num_unit_rows > READ_ROWS:
                continue
            units.add(unit)
            num_read += num_unit_rows
        taken.append(group)
    quick: Int64 = row_ids[np.isin(groups, taken)]
    return quick


def _require_samples(sample: Sample, manifest: Manifest) -> None:
    """Refuse a sample of which no row can be trained on."""
    num_used = len(sample.lengths) - (sample.num_held_out - len(sample.held_out_rejects))
    if num_used:
        return
    rejects = (*sample.rejects, *sample.held_out_rejects)
    dropped = f": {describe_rejects(rejects, manifest)}" if rejects else ""
    held_out = f", and {sample.num_held_out} are held out" if sample.num_held_out else ""
    remedy = advice(Counter(reject.reason for reject in rejects))
    raise DataError(
        f"none of {sample.num_rows} sampled rows can be used{dropped}{held_out}.{remedy} Nothing "
        f"would be trained: see --row-shape, {LENGTH_FLAGS}"
    )


def _judge(sample: Sample, config: DataConfig, manifest: Manifest) -> None:
    """Judge the rows of a whole set that are not held out, as the ledger does at its end."""
    limits = RejectLimits.of(config)
    num_rows = sample.num_rows - sample.num_held_out
    limits.require_not_fatal(sample.rejects, manifest)
    num_bad = limits.num_bad(sample.rejects)
    if limits.is_share_exceeded(num_bad, num_rows):
        rows = counted(num_rows, "row") + (" that are not held out" if sample.num_held_out else "")
        raise limits.share_error(
            num_bad,
            rows,
            reasons=describe_rejects(sample.rejects, manifest),
            advice=advice(Counter(reject.reason for reject in sample.rejects)),
        )


def _require_held_out(sample: Sample, config: DataConfig, manifest: Manifest) -> None:
    """Refuse a whole set of which no row can be evaluated."""
    if sample.num_held_out == len(sample.held_out_rejects):
        held_out = replace(config, held_out="only")
        raise eval_rows.nothing_to_evaluate(
            sample.held_out_rejects, sample.num_held_out, held_out, manifest
        )
