"""Lays samples end to end, and cuts them apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.types import Encoded, EncodedRows, Int64, RowRejected, Samples


def encoded_rows(outcomes: Mapping[int, Encoded | RowRejected]) -> EncodedRows:
    """Divide the outcomes of rows, by number, into samples end to end and rejects."""
    encoded: list[Encoded] = []
    kept_rows: list[int] = []
    rejected: dict[int, RowRejected] = {}
    for row, outcome in sorted(outcomes.items()):
        if isinstance(outcome, RowRejected):
            rejected[row] = outcome
        else:
            encoded.append(outcome)
            kept_rows.append(row)
    return EncodedRows(samples_of(encoded), np.array(kept_rows, np.int64), rejected)


def samples_of(encoded: Sequence[Encoded]) -> Samples:
    """Lay samples end to end."""
    no_ids, no_mask = np.zeros(0, np.int32), np.zeros(0, np.uint8)  # where there are no samples
    return Samples(
        lengths=np.array([len(sample.input_ids) for sample in encoded], np.int32),
        input_ids=np.concatenate([no_ids, *[sample.input_ids for sample in encoded]]),
        loss_mask=np.concatenate([no_mask, *[sample.loss_mask for sample in encoded]]),
        num_straddling_tokens=np.array(
            [sample.num_straddling_tokens for sample in encoded], np.int32
        ),
        is_truncated=np.array([sample.is_truncated for sample in encoded], np.bool_),
    )


def outcomes_of(encoded: EncodedRows) -> list[Encoded | RowRejected]:
    """Return the outcome of each row by itself."""
    samples = encoded.samples
    outcomes: dict[int, Encoded | RowRejected] = dict(encoded.rejected)
    columns = zip(
        encoded.kept_rows.tolist(),
        pairwise(offsets_of(samples.lengths).tolist()),
        samples.num_straddling_tokens.tolist(),
        samples.is_truncated.tolist(),
        strict=True,
    )
    for row, (begin, end), num_straddling, is_truncated in columns:
        ids, loss_mask = samples.input_ids[begin:end], samples.loss_mask[begin:end]
        outcomes[row] = Encoded(ids, loss_mask, num_straddling, is_truncated)
    return [outcomes[row] for row in range(len(outcomes))]


def merged(parts: Sequence[tuple[Int64, Samples]], others: EncodedRows) -> EncodedRows:
    """Return samples that were encoded apart, in the order of their rows.

    Args:
        parts: numbers of rows, ascending, and their samples.
        others: further rows, and all that are rejected.
    """
    if len(others.kept_rows):
        parts = [*parts, (others.kept_rows, others.samples)]
    if not parts:
        return others
    if len(parts) == 1:  # most tables
        return EncodedRows(parts[0][1], parts[0][0], others.rejected)

    rows = np.concatenate([part_rows for part_rows, _ in parts])
    order = rows.argsort()
    samples = taken(concatenated([samples for _, samples in parts]), order)
    return EncodedRows(samples, rows[order], others.rejected)


def taken(samples: Samples, numbers: Int64) -> Samples:
    """Return samples by their numbers, in that order."""
    # Samples that follow one another are copied in one piece.
    is_run_end = np.append(np.diff(numbers) != 1, True)[: len(numbers)]
    is_run_begin = np.append(True, is_run_end[:-1])[: len(numbers)]
    offsets = offsets_of(samples.lengths)
    begins = offsets[numbers[is_run_begin]].tolist()
    ends = offsets[numbers[is_run_end] + 1].tolist()
    runs = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
    no_ids, no_mask = samples.input_ids[:0], samples.loss_mask[:0]
    return Samples(
        lengths=samples.lengths[numbers],
        input_ids=np.concatenate([no_ids, *[samples.input_ids[run] for run in runs]]),
        loss_mask=np.concatenate([no_mask, *[samples.loss_mask[run] for run in runs]]),
        num_straddling_tokens=samples.num_straddling_tokens[numbers],
        is_truncated=samples.is_truncated[numbers],
    )


def concatenated(parts: Sequence[Samples]) -> Samples:
    """Lay samples end to end that lie so in some parts, at least one."""
    return Samples(
        lengths=np.concatenate([part.lengths for part in parts]),
        input_ids=np.concatenate([part.input_ids for part in parts]),
        loss_mask=np.concatenate([part.loss_mask for part in parts]),
        num_straddling_tokens=np.concatenate([part.num_straddling_tokens for part in parts]),
        is_truncated=np.concatenate([part.is_truncated for part in parts]),
    )
