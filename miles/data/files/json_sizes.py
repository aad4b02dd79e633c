"""An upper bound for the length of the JSON of Arrow's values, without writing it.

    list<string>   [["a", "bc"], null]   ->   [40, 8]

Text counts with six bytes for each of its own: a control character is written as `\\u0000`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miles.common.offsets import offsets_of
from miles.data.files.arrow_types import is_any_list, is_text
from miles.data.types import Int64

ESCAPED_BYTES = 6
"""A control character is written as `\\u0000`."""
_MARK_BYTES = 8
"""Quotes, brackets, a comma, or null."""
_NUMBER_BYTES = 128
"""A decimal has 76 digits at most."""

_IS_NUMBER = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_float32,
    pa.types.is_float64,
    pa.types.is_decimal,
)


def has_size(kind: pa.DataType) -> bool:
    """Return whether valid values of a type always have JSON, whose length is bounded here."""
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_map(kind):
        return False
    if is_text(kind) or any(test(kind) for test in _IS_NUMBER):
        return True
    if is_any_list(kind):
        return has_size(kind.value_type)
    return pa.types.is_struct(kind) and all(has_size(field.type) for field in kind)


def most_bytes(array: pa.Array) -> Int64:
    """Return at most how long the JSON of each value is: int64 [values].

    Args:
        array: of a type that `has_size`.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        words = np.append(most_bytes(array.dictionary), _MARK_BYTES)
        sizes: Int64 = words[_without_nulls(array.indices, len(words) - 1)]
        return sizes
    if is_text(kind):
        return text_lengths(array) * ESCAPED_BYTES + _MARK_BYTES
    if pa.types.is_struct(kind):
        total = np.full(len(array), _MARK_BYTES, np.int64)
        for field, values in zip(kind, array.flatten(), strict=True):
            total += most_bytes(values) + len(field.name.encode()) * ESCAPED_BYTES + _MARK_BYTES
        return total
    if is_any_list(kind):
        return sums_of_lists(most_bytes(array.flatten()), list_lengths(array)) + _MARK_BYTES
    return np.full(len(array), _NUMBER_BYTES, np.int64)


def text_lengths(texts: pa.Array) -> Int64:
    """Return the bytes of each text, 0 for null: int64 [texts]."""
    if pa.types.is_string_view(texts.type):  # pyarrow (26.0) has no lengths of them
        texts = texts.cast(pa.large_string())
    return _without_nulls(pc.binary_length(texts), 0)


def list_lengths(lists: pa.Array) -> Int64:
    """Return the number of values of each list, 0 for null: int64 [lists]."""
    return _without_nulls(pc.list_value_length(lists), 0)


def sums_of_lists(values: Int64, lengths: Int64) -> Int64:
    """Return the sum of each list's values: int64 [lists].

    Args:
        values: int64, of all lists end to end.
        lengths: int64 [lists].
    """
    sums: Int64 = np.diff(offsets_of(values)[offsets_of(lengths)])
    return sums


def _without_nulls(numbers: pa.Array, instead: int) -> Int64:
    filled = numbers.cast(pa.int64()).fill_null(instead)
    array: Int64 = filled.to_numpy(zero_copy_only=False)
    return array
