"""Rows behind the user's function: JSON text in, JSON text out, before anything reads the row.

    {"q": "2+2?", "a": "4"}   -> [{"role": "user", …}, …]  ->  {"messages": [{"role": "user", …}, …]}
                              -> {"prompt": "2+2?", …}     ->  the same, as JSON
                              -> None                      ->  rejected: left_out_by_transform
                              -> an exception, 17, a set   ->  rejected: transform_error

All that follows sees what it would see if the function's rows were those of the file. A row that
cannot be read does not reach the function: it is rejected for its own reason, later.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from miles.common.no_json import NoJsonError, as_json
from miles.common.shown import cut
from miles.data.files.raw_values import has_too_many_values
from miles.data.files.turn_values import ROLE_KEYS
from miles.data.reasons import LEFT_OUT_BY_TRANSFORM
from miles.data.transforms import Transform
from miles.data.types import MAX_ROW_BYTES, RowRejected

_WITH_TEXT = (
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    ModuleNotFoundError,
    NameError,
    TypeError,
    UnboundLocalError,
    ZeroDivisionError,
)
"""Python's own exceptions whose text names code. That of others may quote the row, and is not kept."""
_TEXT_CHARACTERS = 80


def transformed(payload: bytes, transform: Transform) -> bytes:
    """Return what the function makes of a row.

    Args:
        payload: the row, JSON text. One that cannot be read is returned as it is.
        transform: whose function is called.

    Raises:
        RowRejected: "left_out_by_transform" or "transform_error".
        ConfigError: the function cannot be imported here, or is another one.
    """
    function = transform.function
    row = _parsed(payload)
    if row is None:
        return payload
    try:
        made = function(row)
    except (Exception, SystemExit) as error:
        raise RowRejected("transform_error", _described(error, function)) from None
    if made is None:
        raise RowRejected(LEFT_OUT_BY_TRANSFORM, f"{transform.name} returned None")

    if isinstance(made, list | tuple):
        _require_messages(made)
        made = {"messages": made}
    if not isinstance(made, Mapping):
        raise RowRejected(
            "transform_error",
            f"it returned a value of type {type(made).__name__}; expected a dict, a list of "
            "messages, or None",
        )
    try:
        return as_json(dict(made))
    except NoJsonError as error:
        raise RowRejected("transform_error", f"in the row that it returned: {error}") from None


def _require_messages(made: Sequence[Any]) -> None:
    """Refuse a list of rows: it would be read as the exchanges of one conversation.

    Raises:
        RowRejected: none of the dicts in it is a message.
    """
    dicts = [item for item in made if isinstance(item, Mapping)]
    if dicts and not any(key in item for item in dicts for key in ROLE_KEYS):
        raise RowRejected(
            "transform_error",
            "it returned a list of dicts without a role; expected one row, a list of messages, or "
            "None",
        )


def _parsed(payload: bytes) -> dict[str, Any] | None:
    """Return a row; None where it cannot be read, or would take too much memory."""
    if len(payload) > MAX_ROW_BYTES or has_too_many_values(payload):
        return None
    try:
        # NaN and infinities are read as null, as they are without a function.
        row = json.loads(payload.decode(), parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return row if type(row) is dict else None


def _described(error: BaseException, function: Any) -> str:
    """Return an exception's type and line: `KeyError: 'answer' (line 12 of my_rows.py)`."""
    text = ""
    if type(error) in _WITH_TEXT:
        text = f": {cut(' '.join(str(error).split()), _TEXT_CHARACTERS)}"
    return f"{type(error).__name__}{text}{_line_of(error.__traceback__, function)}"


def _line_of(trace: TracebackType | None, function: Any) -> str:
    """Return the last line in the function's file, or else the last one, that an error passed."""
    code = getattr(function, "__code__", None)
    frames = traceback.extract_tb(trace)[1:]
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    for frame in reversed(own or frames):
        return f" (line {frame.lineno} of {os.path.basename(frame.filename)})"
    return ""
