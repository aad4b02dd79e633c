"""A raw row -> a conversation: OpenAI messages, tools, and which turns the row lets be trained.

    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 1}]}
    ->  messages ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"})
        trained  (False, True)

Understands ShareGPT turns (`from`/`value`) and OpenAI messages (`role`/`content`), told apart by the turns
themselves. Errors say position and type, never the row's text.
"""

from __future__ import annotations

import json
from typing import Any

from miles.data.types import Conversation, RowRejected

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_FLAGS = ("weight", "train", "loss", "training", "step_loss_mask")
_KEPT = ("reasoning_content", "tool_calls", "tool_call_id", "name")


def normalize(
    payload: bytes, *, messages_key: str | None = None, tools_key: str | None = None
) -> Conversation:
    """Reads one row.

    Args:
        payload: the row as JSON text, UTF-8.
        messages_key: where the conversation is; None: `messages` or `conversations`, whichever is there.
        tools_key: where the tools are; None: `tools`.

    Raises:
        RowRejected: with the reason, for a row that cannot be used.
    """
    try:
        row = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise RowRejected("malformed_json", type(error).__name__) from error
    if not isinstance(row, dict):
        raise RowRejected("not_an_object", f"a {type(row).__name__}")
    turns = row.get(messages_key) if messages_key else None
    if turns is None:
        turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowRejected("no_messages", f"found {'nothing' if not turns else type(turns).__name__}")

    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RowRejected("bad_message", f"turn {position} is a {type(turn).__name__}, not an object")
        message = _message(turn, position)
        messages.append(message)
        trained.append(message["role"] == "assistant" and not any(_is_off(turn.get(flag)) for flag in _FLAGS))
    system = row.get("system_prompt") or row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        trained.insert(0, False)
    if not any(trained):
        raise RowRejected("nothing_to_train", "no assistant turn, or none that may be trained")
    return Conversation(tuple(messages), _tools(row.get(tools_key or "tools")), tuple(trained))


def _is_off(flag: Any) -> bool:
    return flag is not None and not flag


def _message(turn: dict[str, Any], position: int) -> dict[str, Any]:
    is_sharegpt = "from" in turn
    name = turn.get("from") if is_sharegpt else turn.get("role")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowRejected("unknown_role", f"turn {position}")
    content = turn.get("value") if is_sharegpt else turn.get("content")
    if name == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _function_call(content, position)}
    message: dict[str, Any] = {"role": role}
    for key in _KEPT:
        if turn.get(key):
            message[key] = turn[key]
    if isinstance(content, list):
        content = _join_parts(content, position)
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        raise RowRejected("bad_message", f"content of turn {position} is {type(content).__name__}, not text")
    message["content"] = content
    return message


def _join_parts(parts: list[Any], position: int) -> str:
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise RowRejected("bad_message", f"turn {position} has a part that is not text")
    return "".join(part["text"] for part in parts)


def _function_call(value: Any, position: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowRejected("bad_message", f"the function call of turn {position} is not JSON") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowRejected("bad_message", f"the function call of turn {position} has no name")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise RowRejected("malformed_json", "the tools are not JSON") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowRejected("bad_message", "the tools are not a list of objects")
    return tuple(value)
