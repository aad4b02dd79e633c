"""Columns of images, sound and films, by their names.

What they hold is not read where it is bytes. A text that stands around an image ("<image>") means
nothing without it, so the JSON of such a row says that the column is there:

    {"text": "<image> What is this?"}  ->  {"text": "<image> What is this?","image":true}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

MEDIA: Mapping[str, str] = {
    "image": "<image>",
    "images": "<image>",
    "audio": "<audio>",
    "audios": "<audio>",
    "video": "<video>",
    "videos": "<video>",
}
"""Name of a column of a row, or of a key of a turn -> what stands for it in a text."""


def with_unread_media(rows: list[bytes], unread: Collection[str]) -> list[bytes]:
    """Return rows of a table whose JSON names the columns of images, … that were not read.

    Args:
        rows: each a JSON object, or what stands for a row without JSON.
        unread: columns of the table that were not read.
    """
    names = [name for name in MEDIA if name in unread]
    if not names:
        return rows
    keys = ",".join(f'"{name}":true' for name in names).encode() + b"}"
    named = []
    for row in rows:
        if row == b"{}":  # no other column was read
            named.append(b"{" + keys)
        else:
            named.append(row[:-1] + b"," + keys if row.endswith(b"}") else row)
    return named
