"""Turns of ShareGPT (`from`, `value`) or OpenAI (`role`, `content`) -> messages and flags.

    {"from": "gpt", "value": "4", "weight": 0}
    ->  {"role": "assistant", "content": "4"}, flag False

The two are told apart turn by turn. A key whose value is null is as good as absent, at any depth:
Parquet gives every struct every field of its column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.config import RowFormat
from miles.data.rows.json_text import MAX_DEPTH, read_json, without_nulls
from miles.data.rows.reject import reject, type_of
from miles.data.rows.tool_calls import function_calls, openai_calls

_CALL = "function_call"
ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": _CALL,  # the assistant's; its content is a call as JSON text
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Name of a role in the rows -> role of the message."""
TRAIN_FLAGS = ("weight", "train", "training", "loss", "step_loss_mask")
"""Keys of a turn that say whether it is trained; of several, one that is 0 or false decides."""
EXTRA = "extra"
"""Key of a turn with further keys of it, as the JSON text of an object: `Prepared.write` puts there
what it has no column for."""

_NOT_IN_MESSAGE = frozenset(("role", "from", "content", "value", *TRAIN_FLAGS))

Messages = list[Mapping[str, Any]]
Flags = list[bool | None]


def read_turns(turns: Sequence[Any], what: str, format: RowFormat) -> tuple[Messages, Flags]:
    """Return a message and a flag for each turn.

    Args:
        what: the name of a turn in the detail of a reject, such as "turn".
        format: has the roles that the user named.

    Returns:
        Messages with "role" and "content", and whether the row says that each is trained; None
        where it says nothing.
    """
    roles = {**ROLES, **format.roles} if format.roles else ROLES
    messages: Messages = []
    flags: Flags = []
    for position, turn in enumerate(turns):
        if type(turn) is not dict:
            reject("bad_message", f"{what} {position} is {type_of(turn)}, not an object")

        name = turn.get("role")
        if name is None:
            name = turn.get("from")
        role = roles.get(name) if type(name) is str else None
        if role is None:
            reject(
                "unknown_role",
                f"{what} {position}: its role is {type_of(name)}, none of the known ones",
            )

        content = turn.get("content")
        if content is None:
            content = turn.get("value")

        if role == _CALL:
            calls = function_calls(content, f"{what} {position}")
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            flags.append(_flag(turn, f"{what} {position}"))
        elif len(turn) == 2 and type(content) is str:  # a role and a content: most turns
            messages.append({"role": role, "content": content})
            flags.append(None)
        else:
            messages.append(_message(turn, role, content, f"{what} {position}"))
            flags.append(_flag(turn, f"{what} {position}") if role == "assistant" else None)
    return messages, flags


def _message(turn: Mapping[str, Any], role: str, content: Any, where: str) -> dict[str, Any]:
    message = {"role": role, "content": content}
    for key, value in turn.items():
        if key not in _NOT_IN_MESSAGE and value is not None:
            message[key] = without_nulls(value, where)

    if type(message.get(EXTRA)) is str:
        message = _with_extra(message)

    if "tool_calls" in message:
        message["tool_calls"] = openai_calls(message["tool_calls"], where)
        if not message["tool_calls"]:  # as good as absent
            del message["tool_calls"]

    if type(content) is not str:
        message["content"] = _content(content, where, may_be_absent="tool_calls" in message)
    return message


def _with_extra(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the keys that `EXTRA` holds; as it is where that is the row's text."""
    try:
        # A message's value was within it by some levels.
        extra = read_json(message[EXTRA], max_depth=MAX_DEPTH + 10)
    except ValueError:
        return message
    if type(extra) is not dict:
        return message
    return extra | {key: value for key, value in message.items() if key != EXTRA}


def _flag(turn: Mapping[str, Any], where: str) -> bool | None:
    """Return whether the turn says that it is trained; None if it says nothing."""
    flags = []
    for key in TRAIN_FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            reject("bad_message", f"{where}: {key} is {type_of(value)}, not a number")
        flags.append(value != 0)
    return all(flags) if flags else None


def _content(content: Any, where: str, *, may_be_absent: bool) -> str:
    """Return content that is not a string as text: absent, or a list of parts that are all text."""
    if content is None and may_be_absent:
        return ""
    if type(content) is not list:
        reject("bad_message", f"{where}: content is {type_of(content)}, not text")

    texts = []
    for number, part in enumerate(content):
        is_text_part = type(part) is dict and part.get("type") in ("text", None)
        text = part.get("text") if is_text_part else part
        if type(text) is not str:
            reject("bad_message", f"{where}: part {number} of the content is not text")
        texts.append(text)
    return "".join(texts)
