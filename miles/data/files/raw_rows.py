"""Rows as they were read, in Arrow: each is JSON text, or plain turns.

    row   payloads                turns
    0     null                    [{role: human, content: 2+2?}, {role: gpt, content: "4"}]
    1     {"messages": […], …}    null

Most rows of tables are plain (`plain_rows`), and need no Python object before they are normalized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miles.common.offsets import offsets_of
from miles.data.step_schemas import PAYLOAD, TURNS
from miles.data.types import Int64


@dataclass(frozen=True, eq=False)
class RawRows:
    """Rows in Arrow. Each is null in one of the two columns."""

    payloads: pa.Array
    """`PAYLOAD` [rows]: JSON text"""
    turns: pa.Array
    """`TURNS` [rows]: role and content of each turn, texts as they were written"""

    def __len__(self) -> int:
        return len(self.payloads)

    def num_bytes(self) -> Int64:
        """Return the bytes of each row's text: int64 [rows]."""
        of_payloads = pc.fill_null(pc.binary_length(self.payloads), 0).to_numpy()
        fields = self.turns.flatten()
        of_turns = sum(
            pc.binary_length(fields.field(name)).to_numpy() for name in ("role", "content")
        )
        counts = pc.fill_null(self.turns.value_lengths(), 0).to_numpy()
        num_bytes: Int64 = of_payloads + np.diff(offsets_of(of_turns)[offsets_of(counts)])
        return num_bytes

    def slice(self, begin: int, num_rows: int) -> RawRows:
        """Return rows that follow one another."""
        return RawRows(self.payloads.slice(begin, num_rows), self.turns.slice(begin, num_rows))

    def take(self, numbers: Int64) -> RawRows:
        """Return some rows, in the order asked."""
        indices = pa.array(numbers)
        return RawRows(self.payloads.take(indices), self.turns.take(indices))


def json_rows(payloads: Sequence[bytes]) -> RawRows:
    """Return rows that are JSON text, all of them.

    The first `pa.array` of a process imports pandas, where that is installed: a third of a second,
    which a data set of a few rows is ready without.
    """
    offsets = offsets_of([len(payload) for payload in payloads])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(payloads))]
    return RawRows(
        pa.Array.from_buffers(PAYLOAD, len(payloads), buffers), pa.nulls(len(payloads), TURNS)
    )


def joined(parts: Sequence[RawRows]) -> RawRows:
    """Return the rows of all parts, end to end."""
    if len(parts) == 1:
        return parts[0]
    payloads = [part.payloads for part in parts]
    turns = [part.turns for part in parts]
    return RawRows(
        pa.concat_arrays(payloads) if parts else pa.array([], PAYLOAD),
        pa.concat_arrays(turns) if parts else pa.array([], TURNS),
    )
