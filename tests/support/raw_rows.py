"""Raw rows and what normalizing makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miles.data.config import RowFormat
from miles.data.rows.normalize import normalize
from miles.data.types import Conversation, RowRejected

ASK = {"from": "human", "value": "2+2?"}
ANSWER = {"from": "gpt", "value": "4"}


def normalized(
    row: Any, shape: str = "messages", /, roles: dict[str, str] | None = None, **columns: str
) -> Conversation:
    """Return the conversation of a row, given as JSON values."""
    return normalize(json.dumps(row).encode(), RowFormat(shape, columns, roles or {}))


def rejected(row: Any, shape: str = "messages", /, **columns: str) -> tuple[str, str]:
    """Return the reason and the detail with which a row is rejected."""
    payload = row if isinstance(row, bytes) else json.dumps(row).encode()
    with pytest.raises(RowRejected) as caught:
        normalize(payload, RowFormat(shape, columns))
    return caught.value.reason, caught.value.detail


def texts(conversation: Conversation) -> list[tuple[str, str]]:
    """Return the role and the content of each message."""
    return [(message["role"], message["content"]) for message in conversation.messages]
