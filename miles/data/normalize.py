"""A raw row -> a conversation: OpenAI messages, tools, and which turns the row lets be trained.

    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 1}],
     "system_prompt": "Be brief."}
    ->  messages  system "Be brief.", user "2+2?", assistant "4"
        trained   False, False, True

ShareGPT (`from`, `value`) and OpenAI (`role`, `content`) are told apart turn by turn. A key whose value is
null is as good as absent, at any depth: Parquet gives every struct every field of its column. What was
written as JSON text (a tools column, a call's arguments) is left as its author wrote it. The detail of a
rejected row gives positions and types, never its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from miles.data.types import Conversation, RowRejected

MESSAGES_KEYS = ("messages", "conversations", "conversation")
"""Where a conversation is looked for; the first that is not null is taken."""

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
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
SYSTEM_KEYS = ("system_prompt", "system")
"""Columns that hold the system turn of a conversation without one."""
TRAIN_FLAGS = ("weight", "train", "training", "loss", "step_loss_mask")
"""Keys of a turn that exclude it from training where they are 0 or false."""
_NOT_IN_MESSAGE = frozenset(("role", "from", "content", "value", *TRAIN_FLAGS))


def normalize(payload: bytes, *, messages_key: str | None = None, tools_key: str | None = None) -> Conversation:
    """Reads one row.

    Args:
        payload: the row, a JSON object in UTF-8.
        messages_key: column of the conversation (a list, or one as JSON text); None: see `MESSAGES_KEYS`.
        tools_key: column of the tools (a list, or one as JSON text); None: "tools".

    Raises:
        RowRejected: the row cannot be used, with one of `REJECT_REASONS`.
    """
    row = _parse(payload)
    turns = _turns(row, messages_key)
    messages: list[Mapping[str, Any]] = []
    trained: list[bool] = []
    for position, turn in enumerate(turns):
        if type(turn) is not dict:
            _reject("bad_message", f"turn {position} is {_type(turn)}, not an object")
        name = turn.get("role")
        if name is None:
            name = turn.get("from")
        role = ROLES.get(name) if type(name) is str else None
        if role is None:
            _reject("unknown_role", f"turn {position}: its role is {_type(name)}, none of the known ones")
        message = _message(turn, role, position, is_function_call=name == "function_call")
        messages.append(message)
        trained.append(role == "assistant" and not _is_excluded(turn, position))
    if True not in trained:
        _reject("nothing_to_train", f"none of {len(turns)} turns is an assistant's that may be trained")
    prompt = next((row[key] for key in SYSTEM_KEYS if row.get(key)), None)
    if type(prompt) is str and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": prompt})
        trained.insert(0, False)
    tools = _tools(row.get(tools_key or "tools"))
    if b"\\ud" in payload or b"\\uD" in payload:  # an escape that may be half of a character
        _require_encodable(messages, tools)
    return Conversation(tuple(messages), tools, tuple(trained))


def _parse(payload: bytes) -> dict[str, Any]:
    try:
        row = json.loads(payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        _reject("malformed_json", f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        _reject("malformed_json", f"{error.msg} at character {error.pos}")
    except ValueError:
        _reject("malformed_json", "a number of too many digits")
    except RecursionError:
        _reject("malformed_json", "nested too deeply")
    if type(row) is not dict:
        _reject("not_an_object", f"the row is {_type(row)}")
    return row


def _turns(row: Mapping[str, Any], messages_key: str | None) -> list[Any]:
    keys = (messages_key,) if messages_key else MESSAGES_KEYS
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        _reject("no_messages", f"no column {' or '.join(keys)}, or it is null")
    turns = row[key]
    if type(turns) is str:
        turns = _json(turns, f"column {key}")
    if type(turns) is not list:
        _reject("no_messages", f"column {key} is {_type(turns)}, not a list")
    if not turns:
        _reject("no_messages", f"column {key} is empty")
    return turns


def _message(turn: dict[str, Any], role: str, position: int, *, is_function_call: bool) -> dict[str, Any]:
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if is_function_call:
        return {"role": role, "content": "", "tool_calls": _function_calls(content, position)}
    message = {"role": role, "content": content}
    for key, value in turn.items():
        if key not in _NOT_IN_MESSAGE and value is not None:
            message[key] = _without_nulls(value)
    if "tool_calls" in message:
        _check_tool_calls(message, position)
    if type(content) is not str:
        message["content"] = _text(content, position, may_be_absent="tool_calls" in message)
    return message


def _is_excluded(turn: Mapping[str, Any], position: int) -> bool:
    for key in TRAIN_FLAGS:
        if key in turn and (flag := turn[key]) is not None:
            if not isinstance(flag, (int, float)):
                _reject("bad_message", f"turn {position}: {key} is {_type(flag)}, not a number")
            if flag == 0:
                return True
    return False


def _text(content: Any, position: int, *, may_be_absent: bool) -> str:
    """Content that is not a string: absent beside tool calls, or a list of parts, joined where all are text."""
    if content is None and may_be_absent:
        return ""
    if type(content) is not list:
        _reject("bad_message", f"turn {position}: content is {_type(content)}, not text")
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if type(part) is dict and part.get("type") in ("text", None) else part
        if type(text) is not str:
            _reject("bad_message", f"turn {position}: part {number} of the content is not text")
        texts.append(text)
    return "".join(texts)


def _function_calls(value: Any, position: int) -> list[dict[str, Any]]:
    """ShareGPT's `function_call` turn, `{"name", "arguments"}` or a list of them, as OpenAI tool calls."""
    try:
        calls = json.loads(value) if type(value) is str else value
    except (ValueError, RecursionError):
        _reject("bad_message", f"turn {position}: the function call is not JSON")
    calls = calls if type(calls) is list else [calls]
    if not calls:
        _reject("bad_message", f"turn {position}: the list of function calls is empty")
    tool_calls = []
    for number, call in enumerate(calls):
        if type(call) is not dict or type(call.get("name")) is not str:
            _reject("bad_message", f"turn {position}: function call {number} is not an object with a name")
        arguments = call.get("arguments")
        function = {"name": call["name"], "arguments": {} if arguments is None else arguments}
        tool_calls.append({"type": "function", "function": function})
    return tool_calls


def _check_tool_calls(message: dict[str, Any], position: int) -> None:
    calls = message["tool_calls"]
    if type(calls) is not list:
        _reject("bad_message", f"turn {position}: tool_calls is {_type(calls)}, not a list")
    for number, call in enumerate(calls):
        function = call.get("function", call) if type(call) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            _reject("bad_message", f"turn {position}: tool call {number} has no function with a name")
    if not calls:
        del message["tool_calls"]


def _tools(value: Any) -> tuple[Mapping[str, Any], ...] | None:
    is_text = type(value) is str
    if is_text:
        value = _json(value, "column of the tools") if value.strip() else None
    if value is None or value == []:
        return None
    if type(value) is not list:
        _reject("bad_message", f"the tools are {_type(value)}, not a list")
    tools = []
    for number, tool in enumerate(value):
        if type(tool) is str:
            tool = _json(tool, f"tool {number}")
        elif not is_text:
            tool = _without_nulls(tool)
        if type(tool) is not dict:
            _reject("bad_message", f"tool {number} is {_type(tool)}, not an object")
        tools.append(tool)
    return tuple(tools)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        _reject("malformed_json", f"the {what} is not JSON")


def _without_nulls(value: Any) -> Any:
    if type(value) is dict:
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if type(value) is list:
        return [_without_nulls(item) for item in value]
    return value


def _require_encodable(messages: list[Mapping[str, Any]], tools: tuple[Mapping[str, Any], ...] | None) -> None:
    """A lone surrogate is valid JSON but no text: no tokenizer takes it."""
    for what, part in [*((f"message {i}", message) for i, message in enumerate(messages)), ("tools", tools)]:
        try:
            json.dumps(part, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            _reject("bad_message", f"{what}: half of a surrogate pair, which is not text")


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number")


def _reject(reason: str, detail: str) -> NoReturn:
    raise RowRejected(reason, detail) from None
