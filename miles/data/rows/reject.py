"""The rejection of a row: a reason, and a detail of positions and types, never its text."""

from __future__ import annotations

from typing import Any, NoReturn

from miles.data.types import RowRejected

_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    type(None): "null",
    bool: "true or false",
}


def reject(reason: str, detail: str) -> NoReturn:
    """Reject the row.

    Args:
        reason: one of `REJECT_REASONS`.
    """
    raise RowRejected(reason, detail) from None


def type_of(value: Any) -> str:
    """Return what a JSON value is, in words for the detail of a reject."""
    return _TYPE_NAMES.get(type(value), "a number")
