"""Lays samples end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.data.types import Encoded, EncodedRows, RowRejected, Samples


def encoded_rows(outcomes: Sequence[Encoded | RowRejected]) -> EncodedRows:
    """Divide the outcomes of rows into samples, end to end, and rejects."""
    encoded = [outcome for outcome in outcomes if isinstance(outcome, Encoded)]
    kept_rows = [row for row, outcome in enumerate(outcomes) if isinstance(outcome, Encoded)]
    rejected = {
        row: outcome for row, outcome in enumerate(outcomes) if isinstance(outcome, RowRejected)
    }
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
