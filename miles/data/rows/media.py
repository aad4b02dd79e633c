"""Images, sound and films of a row, which are not trained on: such a row is dropped, not cut.

{"image": "1.jpg", …, "value": "<image>\\nWhat is this?"}   has_image
{"image": "1.jpg", …, "value": "Name a tree."}             text: the image illustrates it
{…, "value": "In HTML, write <image>."}                    text: there is no image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.files.media_columns import MEDIA
from miles.data.rows.reject import reject

_KEYS = frozenset(MEDIA)
_PART_TYPES = frozenset(
    f"{before}{medium}{after}"
    for medium in ("image", "audio", "video")
    for before in ("", "input_")
    for after in ("", "_url")
)
_PART_KEYS = _KEYS | _PART_TYPES


def require_no_media(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    """Reject a row with an image, sound or film that its text stands around."""
    if _KEYS.isdisjoint(row):
        return
    for key in MEDIA:
        if not row.get(key):
            continue
        for position, message in enumerate(messages):
            if MEDIA[key] in message["content"]:
                reject("has_image", f"message {position} says {MEDIA[key]}, and the row has {key}")


def is_media_part(part: Any) -> bool:
    """Return whether a part of a content is an image, sound or film."""
    if type(part) is not dict:
        return False
    kind = part.get("type")
    if type(kind) is str and kind in _PART_TYPES:
        return True
    return any(part.get(key) for key in _PART_KEYS)
