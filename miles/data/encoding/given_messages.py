"""Requires of messages given to `miles.data.encode` what `rows/normalize.py` makes of a file's rows.

content    text, null, or a list of parts
arguments  of a tool call: an object, or its JSON text
flags      stand in the argument `flags`, not in the messages: nothing here reads them there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.rows.reject import reject, type_of
from miles.data.rows.tool_calls import tool_arguments
from miles.data.rows.train_flags import TRAIN_DETAIL, TRAIN_FLAGS
from miles.errors import ConfigError

_PLAIN = frozenset(("role", "content"))
"""The keys of a message that is nothing but text."""


def require_given_messages(messages: Sequence[Mapping[str, Any]], *, has_flags: bool) -> None:
    """Require of each message that nothing of it would be trained by mistake.

    Args:
        has_flags: `flags` is given; it says what is trained, whatever the messages say.

    Raises:
        ConfigError: a message flags its own training.
        RowRejected: bad_message, bad_tool_call
    """
    for number, message in enumerate(messages):
        content = message.get("content")
        if type(content) is str and len(message) == len(_PLAIN) and message.keys() == _PLAIN:
            continue  # most messages

        where = f"message {number}"
        if content is not None and not isinstance(content, (str, list, tuple)):
            reject("bad_message", f"{where}: its content is {type_of(content)}, not text")
        _require_arguments(message.get("tool_calls"), where)

        if not has_flags:
            for key in (*TRAIN_FLAGS, TRAIN_DETAIL):
                if message.get(key) is not None and message.get("role") == "assistant":
                    raise ConfigError(
                        f"{where} has the key {key!r}, which is not read here; say what is trained "
                        "with the argument flags: one for each message, False to exclude it, True "
                        "to train it, None otherwise"
                    )


def _require_arguments(calls: Any, where: str) -> None:
    if not isinstance(calls, (list, tuple)):
        return
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(arguments, Mapping):
            tool_arguments(arguments, f"{where}: tool call {number}")
