"""A raw row -> a conversation: OpenAI messages, tools, and what the row says of each turn; or plain text.

    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 1}],
     "system_prompt": "Be brief."}
    ->  messages  system "Be brief.", user "2+2?", assistant "4"
        flags     None, None, True

A `RowFormat` says which of four shapes the row has:

    messages           ShareGPT (`from`, `value`) or OpenAI (`role`, `content`), told apart turn by turn
    alpaca             [system,] history's pairs, then instruction + "\\n" + input -> output; of an empty one of the
                       two no newline
    prompt_completion  two texts; or two lists of messages, of which only the completion's are trained
    text               one text, trained in whole

A key whose value is null is as good as absent, at any depth, and NaN is as null: Parquet gives every struct
every field of its column. What was written as JSON text is left as its author wrote it: tools, and the
arguments of a call, which become the object that the text spells (`tool_arguments`). The detail of a rejected
row gives positions and types, never its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from miles.data.config import RowFormat
from miles.data.files.row_shapes import USUAL_COLUMNS, USUAL_PAIRS, column_of, pair_of
from miles.data.types import Conversation, RowRejected

MESSAGES = RowFormat("messages")

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
    "function_call": _CALL,  # an assistant's, with a call as JSON text for its content
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TRAIN_FLAGS = ("weight", "train", "training", "loss", "step_loss_mask")
"""Keys of a turn that say whether it is trained; of several, one that is 0 or false has the last word."""
EXTRA = "extra"
"""Key of a turn with further keys of it, as the JSON text of an object: what `Prepared.write` has no column for."""
MAX_DEPTH = 100
"""Lists and objects within one another; what is nested more deeply is no message."""

_BOM = b"\xef\xbb\xbf"
_CALL_KEYS = ("id", "type", "function", "name", "arguments")
_NOT_IN_MESSAGE = frozenset(("role", "from", "content", "value", *TRAIN_FLAGS))
_ROW = json.JSONDecoder(parse_constant=lambda name: None)
_TEXT = json.JSONDecoder()


def normalize(payload: bytes, format: RowFormat = MESSAGES) -> Conversation:
    """Reads one row.

    Args:
        payload: the row, a JSON object in UTF-8.
        format: its shape, which is not "auto" (`formats.detect_format`), the columns and roles that were named.

    Raises:
        RowRejected: the row cannot be used, with one of `REJECT_REASONS`.
    """
    assert format.shape != "auto", "the shape is found before rows are read"
    row = _parse(payload)
    if format.shape == "text":
        return _plain_text(row, format)
    messages: list[Mapping[str, Any]] = []
    flags: list[bool | None] = []
    if format.shape == "messages":
        _add_turns(_turns(row, format), "turn", format, messages, flags)
    elif format.shape == "alpaca":
        messages += _alpaca(row, format)
        flags += [None] * len(messages)
    else:
        _add_prompt_and_completion(row, format, messages, flags)
    for message, flag in zip(messages, flags, strict=True):
        if flag is not False and message["role"] == "assistant":
            break
    else:
        _reject(
            "nothing_to_train",
            f"none of {len(messages)} turns is an assistant's that may be trained",
        )
    prompt = _system(row, format)
    if prompt is not None and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": prompt})
        flags.insert(0, None)
    tools = _tools(row, format)
    if b"\\ud" in payload or b"\\uD" in payload:  # an escape that may be half of a character
        _require_encodable(messages, tools)
    return Conversation(tuple(messages), tools, tuple(flags))


def _parse(payload: bytes) -> dict[str, Any]:
    if payload.startswith(_BOM):
        payload = payload[len(_BOM) :]
    try:
        row = _ROW.decode(payload.decode("utf-8"))
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


def _plain_text(row: Mapping[str, Any], format: RowFormat) -> Conversation:
    text = _text_of(row, "text", format)
    if text is None:
        _reject("no_messages", _missing("text", format))
    if not text or text.isspace():
        _reject("nothing_to_train", "the text is empty")
    if not _is_encodable(text):
        _reject("bad_message", "the text: half of a surrogate pair, which is not text")
    return Conversation((), None, (), text)


def _alpaca(row: Mapping[str, Any], format: RowFormat) -> list[Mapping[str, Any]]:
    instruction, given = _text_of(row, "instruction", format), _text_of(row, "input", format)
    output = _text_of(row, "output", format)
    if output is None:
        _reject("no_messages", _missing("output", format))
    question = "\n".join(part for part in (instruction, given) if part)
    if not question:
        _reject(
            "no_messages",
            f"neither instruction nor input: {_missing('instruction', format)}, or empty",
        )
    pairs = [*_history(row, format), (question, output)]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _history(row: Mapping[str, Any], format: RowFormat) -> list[Any]:
    """Alpaca's earlier exchanges, [user, assistant] each; they are trained as the last one is."""
    column = column_of("history", row, format.columns)
    pairs = row[column] if column is not None else []
    if type(pairs) is str:
        pairs = _json(pairs, f"column {column}") if pairs.strip() else []
    if type(pairs) is not list:
        _reject("bad_message", f"column {column} is {_type(pairs)}, not a list")
    for number, pair in enumerate(pairs):
        if type(pair) is not list or len(pair) != 2 or not all(type(text) is str for text in pair):
            _reject("bad_message", f"column {column}: entry {number} is not a list of two texts")
    return pairs


def _add_prompt_and_completion(
    row: Mapping[str, Any],
    format: RowFormat,
    messages: list[Mapping[str, Any]],
    flags: list[bool | None],
) -> None:
    """Either column may be a text, which is one turn, or a list of messages."""
    pair = pair_of(row, format.columns)
    if pair is None:
        named = [format.columns.get(field) for field in ("prompt", "completion")]
        pairs = dict.fromkeys(
            (named[0] or prompt, named[1] or answer) for prompt, answer in USUAL_PAIRS
        )
        expected = " or ".join(f"{prompt} and {answer}" for prompt, answer in pairs)
        _reject("no_messages", f"no columns {expected}, or one of them is null")
    for column, role in zip(pair, ("user", "assistant"), strict=True):
        value = row[column]
        if type(value) is str:
            messages.append({"role": role, "content": value})
            flags.append(None)
        elif type(value) is list and value:
            _add_turns(value, f"column {column}, turn", format, messages, flags)
        elif value == []:
            _reject("no_messages", f"column {column} is empty")
        else:
            _reject(
                "bad_message",
                f"column {column} is {_type(value)}, neither text nor a list of messages",
            )
        if role == "user":
            flags[:] = [False if message["role"] == "assistant" else None for message in messages]


def _turns(row: Mapping[str, Any], format: RowFormat) -> list[Any]:
    column = column_of("messages", row, format.columns)
    if column is None:
        _reject("no_messages", _missing("messages", format))
    turns = row[column]
    if type(turns) is str:
        turns = _json(turns, f"column {column}", _ROW)
    if type(turns) is not list:
        _reject("no_messages", f"column {column} is {_type(turns)}, not a list")
    if not turns:
        _reject("no_messages", f"column {column} is empty")
    return turns


def _add_turns(
    turns: Sequence[Any],
    what: str,
    format: RowFormat,
    messages: list[Mapping[str, Any]],
    flags: list[bool | None],
) -> None:
    """Appends a message and a flag for each turn; `what` is how a turn is called in the detail of a reject."""
    roles = {**ROLES, **format.roles} if format.roles else ROLES
    for position, turn in enumerate(turns):
        if type(turn) is not dict:
            _reject("bad_message", f"{what} {position} is {_type(turn)}, not an object")
        name = turn.get("role")
        if name is None:
            name = turn.get("from")
        role = roles.get(name) if type(name) is str else None
        if role is None:
            _reject(
                "unknown_role",
                f"{what} {position}: its role is {_type(name)}, none of the known ones",
            )
        content = turn.get("content")
        if content is None:
            content = turn.get("value")
        if role == _CALL:
            calls = _function_calls(content, f"{what} {position}")
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            flags.append(_flag(turn, f"{what} {position}"))
        elif len(turn) == 2 and type(content) is str:  # a role and a content: most turns
            messages.append({"role": role, "content": content})
            flags.append(None)
        else:
            messages.append(_message(turn, role, content, f"{what} {position}"))
            flags.append(_flag(turn, f"{what} {position}") if role == "assistant" else None)


def _message(turn: Mapping[str, Any], role: str, content: Any, where: str) -> dict[str, Any]:
    message = {"role": role, "content": content}
    for key, value in turn.items():
        if key not in _NOT_IN_MESSAGE and value is not None:
            message[key] = _without_nulls(value, where)
    if type(message.get(EXTRA)) is str:
        message = _with_extra(message)
    if "tool_calls" in message:
        _read_tool_calls(message, where)
    if type(content) is not str:
        message["content"] = _content(content, where, may_be_absent="tool_calls" in message)
    return message


def _with_extra(message: dict[str, Any]) -> dict[str, Any]:
    try:
        extra = read_json(message[EXTRA], max_depth=MAX_DEPTH + 10)  # a message's value, further in
    except ValueError:
        return message  # some text of the row's own
    if type(extra) is not dict:
        return message
    return extra | {key: value for key, value in message.items() if key != EXTRA}


def _flag(turn: Mapping[str, Any], where: str) -> bool | None:
    """Whether the turn says that it is trained; None: it says nothing."""
    flags = []
    for key in TRAIN_FLAGS:
        if key in turn and (value := turn[key]) is not None:
            if not isinstance(value, (int, float)):
                _reject("bad_message", f"{where}: {key} is {_type(value)}, not a number")
            flags.append(value != 0)
    return all(flags) if flags else None


def _content(content: Any, where: str, *, may_be_absent: bool) -> str:
    """Content that is not a string: absent beside tool calls, or a list of parts, joined where all are text."""
    if content is None and may_be_absent:
        return ""
    if type(content) is not list:
        _reject("bad_message", f"{where}: content is {_type(content)}, not text")
    texts = []
    for number, part in enumerate(content):
        text = (
            part.get("text") if type(part) is dict and part.get("type") in ("text", None) else part
        )
        if type(text) is not str:
            _reject("bad_message", f"{where}: part {number} of the content is not text")
        texts.append(text)
    return "".join(texts)


def _function_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's `function_call` turn, `{"name", "arguments"}` or a list of them, as OpenAI tool calls."""
    try:
        calls = read_json(value) if type(value) is str else _without_nulls(value, where)
    except ValueError:
        _reject("bad_message", f"{where}: the function call is not JSON")
    calls = calls if type(calls) is list else [calls]
    if not calls:
        _reject("bad_message", f"{where}: the list of function calls is empty")
    tool_calls = []
    for number, call in enumerate(calls):
        if type(call) is not dict or type(call.get("name")) is not str:
            _reject("bad_message", f"{where}: function call {number} is not an object with a name")
        function = {"name": call["name"], "arguments": tool_arguments(call.get("arguments"))}
        tool_calls.append({"type": "function", "function": function})
    return tool_calls


def _read_tool_calls(message: dict[str, Any], where: str) -> None:
    calls = message["tool_calls"]
    if type(calls) is not list:
        _reject("bad_message", f"{where}: tool_calls is {_type(calls)}, not a list")
    for number, call in enumerate(calls):
        function = call.get("function", call) if type(call) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            _reject("bad_message", f"{where}: tool call {number} has no function with a name")
        function["arguments"] = tool_arguments(function.get("arguments"))
        calls[number] = _in_order(
            call | {"function": _in_order(function)} if "function" in call else function
        )
    if not calls:
        del message["tool_calls"]


def _in_order(call: dict[str, Any]) -> dict[str, Any]:
    """One order of keys, whatever the file's: some templates write a call as JSON."""
    return {key: call[key] for key in _CALL_KEYS if key in call} | call


def tool_arguments(value: Any) -> Any:
    """A call's arguments as chat templates expect them. OpenAI's rows hold JSON text, which servers parse before
    they render: `'{"x": null}'` becomes the object, null included. Text that is not the JSON of an object (or
    needs NaN, Infinity) stays text. No arguments are an empty object."""
    if value is None:
        return {}
    if type(value) is not str or not value.lstrip().startswith("{"):
        return value
    try:
        parsed = read_json(value)
        json.dumps(parsed, allow_nan=False)
    except ValueError:
        return value
    return parsed


def _system(row: Mapping[str, Any], format: RowFormat) -> str | None:
    """The column that holds the system turn of a conversation without one; None: there is none, or it is empty."""
    named = format.columns.get("system")
    for column in (named,) if named is not None else USUAL_COLUMNS["system"]:
        if value := row.get(column):
            if type(value) is not str:
                _reject("bad_message", f"column {column} is {_type(value)}, not text")
            return value
    return None


def _tools(row: Mapping[str, Any], format: RowFormat) -> tuple[Mapping[str, Any], ...] | None:
    column = column_of("tools", row, format.columns)
    if column is None:
        return None
    value = row[column]
    is_text = type(value) is str
    if is_text:
        value = _json(value, f"column {column}") if value.strip() else None
    if value is None or value == []:
        return None
    if type(value) is not list:
        _reject("bad_message", f"the tools are {_type(value)}, not a list")
    tools = []
    for number, tool in enumerate(value):
        if type(tool) is str:
            tool = _json(tool, f"tool {number}")
        elif not is_text:
            tool = _without_nulls(tool, f"tool {number}")
        if type(tool) is not dict:
            _reject("bad_message", f"tool {number} is {_type(tool)}, not an object")
        tools.append(tool)
    return tuple(tools)


def _text_of(row: Mapping[str, Any], field: str, format: RowFormat) -> str | None:
    """The text of a field; None: its column is not there, or null."""
    column = column_of(field, row, format.columns)
    if column is None:
        return None
    text = row[column]
    if type(text) is not str:
        _reject("bad_message", f"column {column} is {_type(text)}, not text")
    return text


def _missing(field: str, format: RowFormat) -> str:
    named = format.columns.get(field)
    return f"no column {' or '.join((named,) if named is not None else USUAL_COLUMNS[field])}, or it is null"


def read_json(text: str, decoder: json.JSONDecoder = _TEXT, max_depth: int = MAX_DEPTH) -> Any:
    """JSON text within a row.

    Raises:
        ValueError: not JSON, nested too deeply, or with half of a surrogate pair.
    """
    try:
        value = decoder.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("{") + text.count("[") > max_depth and _is_deep(value, max_depth):
        raise ValueError("nested too deeply")
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises UnicodeEncodeError
    return value


def _json(text: str, what: str, decoder: json.JSONDecoder = _TEXT) -> Any:
    try:
        return read_json(text, decoder)
    except json.JSONDecodeError as error:
        _reject("malformed_json", f"the {what} is not JSON: {error.msg} at character {error.pos}")
    except UnicodeEncodeError:
        _reject("malformed_json", f"the {what}: half of a surrogate pair, which is not text")
    except ValueError:
        _reject("malformed_json", f"the {what}: nested too deeply, or a number of too many digits")


def _is_deep(value: Any, max_depth: int) -> bool:
    layer = [value]
    for _ in range(max_depth):
        layer = [
            item
            for part in layer
            if isinstance(part, (dict, list))
            for item in (part.values() if isinstance(part, dict) else part)
        ]
    return any(isinstance(part, (dict, list)) for part in layer)


def _without_nulls(value: Any, where: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        _reject("bad_message", f"{where}: nested too deeply")
    if type(value) is dict:
        return {
            key: _without_nulls(item, where, depth + 1)
            for key, item in value.items()
            if item is not None
        }
    if type(value) is list:
        return [_without_nulls(item, where, depth + 1) for item in value]
    return value


def _require_encodable(
    messages: Sequence[Mapping[str, Any]], tools: tuple[Mapping[str, Any], ...] | None
) -> None:
    """A lone surrogate is valid JSON but no text: no tokenizer takes it."""
    for what, part in [
        *((f"message {i}", message) for i, message in enumerate(messages)),
        ("tools", tools),
    ]:
        if not _is_encodable(part):
            _reject("bad_message", f"{what}: half of a surrogate pair, which is not text")


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        type(None): "null",
        bool: "true or false",
    }
    return names.get(type(value), "a number")


def _reject(reason: str, detail: str) -> NoReturn:
    raise RowRejected(reason, detail) from None
