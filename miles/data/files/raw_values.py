"""JSON values in a text, found without making their objects: seven times as fast as by decoding them.

    {"a": 1}, {"a": [2, 3]}   ->   {"a": 1}    {"a": [2, 3]}

msgspec checks the grammar, and takes less than Python's decoder: no NaN, no half of a surrogate
pair. What it does not take is left to that decoder, which is the definition of what a row is.
"""

from __future__ import annotations

import msgspec

from miles.data.types import MAX_ROW_VALUES

_DECODER = msgspec.json.Decoder(list[msgspec.Raw])


def raw_values(text: bytes) -> list[msgspec.Raw] | None:
    """Return the values in a text with commas between them, as they are written.

    Args:
        text: of any encoding that has ASCII's characters as they are.

    Returns:
        Each without the space around it; None: the text is not of this kind, or has what only
        Python's decoder takes.
    """
    try:
        return _DECODER.decode(b"[%b]" % text)
    except (msgspec.DecodeError, RecursionError):
        return None


def has_too_many_values(payload: bytes) -> bool:
    """Return whether a row may have more values than a loader's memory takes (`MAX_ROW_VALUES`)."""
    if len(payload) <= MAX_ROW_VALUES:  # most rows
        return False
    return sum(map(payload.count, (b",", b"[", b"{"))) > MAX_ROW_VALUES
