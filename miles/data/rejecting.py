"""A row's rejection as a value, in place of the exception that a step raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from miles.data.types import RowRejected

_T = TypeVar("_T")


def or_rejected(step: Callable[..., _T], *arguments: Any) -> _T | RowRejected:
    """Run a step on a row. Return its result, or the exception with which it rejects the row.

    It comes without its traceback, which would keep the row's texts as long as the reject.
    """
    try:
        return step(*arguments)
    except RowRejected as rejected:
        return RowRejected(rejected.reason, rejected.detail)
    except RecursionError:
        return RowRejected("malformed_json", "nested too deeply")
