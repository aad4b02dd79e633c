"""The rows that a card and a preview are made from: all of a small set, or some spread over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miles.data.notebook.card import UNKNOWN_ROLE, Summary, unknown_roles
from miles.data.notebook.choose import Looked
from miles.data.stream.row_outcomes import RowOutcome
from miles.data.types import Int64, RowRejected
from miles.data.unused_names import count_row


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows, and what became of them."""

    rows: Looked
    summary: Summary

    @classmethod
    def of(cls, row_ids: Int64, sources: Sequence[str], outcomes: Sequence[RowOutcome]) -> Sample:
        """Return the numbers of rows that were encoded.

        Args:
            row_ids: int64 [rows].
            sources: [rows]: the name of the source of each.
            outcomes: [rows].
        """
        lengths = np.zeros(len(row_ids), np.int64)
        trained = np.zeros(len(row_ids), np.int64)
        reasons: Counter[str] = Counter()
        details: list[str] = []
        unused_keys: dict[str, dict[str, int]] = {}

        for number, (source, outcome) in enumerate(zip(sources, outcomes, strict=True)):
            result = outcome.result
            if isinstance(result, RowRejected):
                reasons[result.reason] += 1
                if result.reason == UNKNOWN_ROLE:
                    details.append(result.detail)
            else:
                lengths[number] = len(result.input_ids)
                trained[number] = int(result.loss_mask.sum())
            if outcome.unused_keys:
                count_row(unused_keys.setdefault(source, {}), outcome.unused_keys)

        return cls(
            Looked(row_ids, lengths, trained),
            Summary(
                len(row_ids),
                lengths[lengths > 0],
                int(trained.sum()),
                reasons,
                unused_keys,
                unknown_roles(details),
            ),
        )
