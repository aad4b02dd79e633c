"""Questions about types of Arrow: lists in any layout, text, bytes, what is nested in a field."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_IS_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_IS_LIST = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_IS_PLAIN = (
    *_IS_TEXT,
    *_IS_LIST,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_null,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_timestamp,
    pa.types.is_duration,
    pa.types.is_struct,
)
"""Tests for the types whose values have a place in a JSON object."""
_CANONICAL = (pa.JsonType, pa.UuidType, pa.Bool8Type)
"""Extension types of Arrow itself that are read. Their code is Arrow's own."""


def is_plain(kind: pa.DataType) -> bool:
    """Return whether values have a place in a JSON object, as far as their own type goes."""
    if isinstance(kind, pa.BaseExtensionType):
        return type(kind) in _CANONICAL
    return any(is_kind(kind) for is_kind in _IS_PLAIN)


def is_text(kind: pa.DataType) -> bool:
    """Return whether values are text, or words of a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in _IS_TEXT)


def is_any_list(kind: pa.DataType) -> bool:
    """Return whether values are lists, in any of Arrow's layouts; a map is none."""
    return any(test(kind) for test in _IS_LIST)


def is_valid(batch: pa.RecordBatch) -> bool:
    """Return whether all text of a batch is UTF-8, and no offset leads outside of it."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def has_map(column: pa.Field) -> bool:
    """Return whether a column is or holds a map."""
    return any(pa.types.is_map(part.type) for part in parts(column))


def has_views(column: pa.Field) -> bool:
    """Return whether text or bytes of a column are views, of which pyarrow takes no single rows."""
    return any(_is_view(part.type) for part in parts(column))


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Return whether values are bytes of any length, which may be text."""
    return any(test(kind) for test in _IS_BINARY)


def parts(part: pa.Field) -> Iterator[pa.Field]:
    """Yield a field and all that are nested in it."""
    if pa.types.is_dictionary(part.type):  # stands for its values
        yield from parts(part.with_type(part.type.value_type))
        return
    yield part
    for number in range(part.type.num_fields):
        yield from parts(part.type.field(number))
