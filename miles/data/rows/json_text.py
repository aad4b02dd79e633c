"""JSON text within a row: decoded with a limit on depth, and checked for text without an encoding.

'{"x": null}'                 ->  {"x": None}
"[[[…"  over 100 deep         ->  ValueError
'"\\ud83d"'  half a pair      ->  ValueError: a lone surrogate is valid JSON, but no text
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from miles.data.rows.reject import reject

MAX_DEPTH = 100
"""Lists and objects within one another; a message has no value that is nested more deeply."""

ROW_DECODER = json.JSONDecoder(parse_constant=lambda name: None)
"""Decodes rows: NaN and infinities become null."""
_DECODER = json.JSONDecoder()
_STRICT_DECODER = msgspec.json.Decoder()
_FINITE_ENCODER = json.JSONEncoder(allow_nan=False)


def strict_object(payload: bytes) -> dict[str, Any] | None:
    """Return a row that is a JSON object and good text, in half the time of Python's decoder.

    msgspec takes less than that decoder, and reads what it takes alike: no NaN, no number beyond a
    float's range, no half of a surrogate pair, no byte-order mark.

    Returns:
        None: it is something else, which is left to Python's decoder.
    """
    try:
        row = _STRICT_DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return row if type(row) is dict else None


def read_json(text: str, decoder: json.JSONDecoder = _DECODER, max_depth: int = MAX_DEPTH) -> Any:
    """Decode JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, or with half of a surrogate pair.
    """
    try:
        value = decoder.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("{") + text.count("[") > max_depth and is_deep(value, max_depth):
        raise ValueError("nested too deeply")
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises UnicodeEncodeError
    return value


def require_json(text: str, what: str, decoder: json.JSONDecoder = _DECODER) -> Any:
    """Decode JSON text, or reject the row.

    Args:
        what: the text's name in the detail, such as "column tools".
    """
    try:
        return read_json(text, decoder)
    except json.JSONDecodeError as error:
        reject("malformed_json", f"the {what} is not JSON: {error.msg} at character {error.pos}")
    except UnicodeEncodeError:
        reject("malformed_json", f"the {what}: half of a surrogate pair, which is not text")
    except ValueError:
        reject("malformed_json", f"the {what}: nested too deeply, or a number of too many digits")


def require_shallow(value: Any, where: str, max_depth: int = MAX_DEPTH) -> None:
    """Reject a row with a value that is nested too deeply.

    Args:
        where: the value's place in the row, for the detail.
    """
    if isinstance(value, (dict, list)) and is_deep(value, max_depth):
        reject("bad_message", f"{where}: nested too deeply")


def require_encodable(
    messages: Sequence[Mapping[str, Any]], tools: tuple[Mapping[str, Any], ...] | None
) -> None:
    """Reject a row with a lone surrogate, which no tokenizer takes."""
    parts: list[tuple[str, Any]] = [
        (f"message {position}", message) for position, message in enumerate(messages)
    ]
    for what, part in [*parts, ("tools", tools)]:
        if not is_encodable(part):
            reject("bad_message", f"{what}: half of a surrogate pair, which is not text")


def is_encodable(value: Any) -> bool:
    """Return whether all text in a value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_deep(value: Any, max_depth: int) -> bool:
    """Return whether lists and objects are nested in more than `max_depth` layers."""
    layer = [value]
    for _ in range(max_depth):
        if not layer:
            return False
        next_layer: list[Any] = []
        for part in layer:
            if isinstance(part, dict):
                next_layer += part.values()
            elif isinstance(part, list):
                next_layer += part
        layer = next_layer
    return any(isinstance(part, (dict, list)) for part in layer)


def has_no_finite_form(value: Any) -> bool:
    """Return whether a number in a value, of 100 layers at most, is infinite or none."""
    try:
        _FINITE_ENCODER.encode(value)
    except ValueError:
        return True
    return False
