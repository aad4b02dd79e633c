"""A raw row -> a conversation: OpenAI messages, tools, and a flag for each turn; or a text.

    {"conversations": [{"from": "human", "value": "2+2?"},
                       {"from": "gpt", "value": "4", "weight": 1}], "system_prompt": "Be brief."}
    ->  messages  system "Be brief.", user "2+2?", assistant "4"
        flags     None, None, True

A `RowFormat` says which of four shapes the row has:

    messages           turns of ShareGPT or OpenAI (`turns`)
    alpaca             [system,] pairs of the history, then instruction + "\\n" + input -> output
                       (no newline if one of the two is empty)
    prompt_completion  two texts; or two lists of messages, where only the completion's are trained
    text               one text, all of it trained

A key whose value is null is as good as absent, at any depth, and NaN is as null: Parquet gives
every struct every field of its column. JSON text within a row is left as its author wrote it:
tools, and the arguments of a call (`tool_calls`). The detail of a rejected row gives positions
and types, never its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from miles.data.config import RowFormat
from miles.data.files.row_shapes import column_of, describe_pairs, pair_of, possible_columns
from miles.data.rows.json_text import ROW_DECODER, is_encodable, require_encodable, require_json
from miles.data.rows.reject import reject, type_of
from miles.data.rows.template_variables import template_kwargs_of
from miles.data.rows.tool_calls import tools_of
from miles.data.rows.turns import Flags, Messages, read_turns
from miles.data.types import MAX_ROW_BYTES, OVERSIZED_ROW, Conversation

MESSAGES = RowFormat("messages")

_BOM = b"\xef\xbb\xbf"
_MAX_VALUES = 16 << 20
"""A row with more commas and opening brackets is rejected: three bytes of it, such as `[],`, take
seventy bytes of memory."""


def normalize(payload: bytes, format: RowFormat = MESSAGES) -> Conversation:
    """Read one row.

    Args:
        payload: the row, a JSON object in UTF-8.
        format: its shape, which is not "auto" (`row_shapes.detect_format`), and the columns and
            roles that the user named.

    Raises:
        RowRejected: the row cannot be used, with one of `REJECT_REASONS`.
    """
    assert format.shape != "auto", "the shape is detected before rows are read"
    row = _parse(payload)
    if format.shape == "text":
        return _plain_text(row, format)

    if format.shape == "messages":
        messages, flags = read_turns(_turns(row, format), "turn", format)
    elif format.shape == "alpaca":
        messages, flags = _alpaca(row, format)
    else:
        messages, flags = _prompt_and_completion(row, format)
    _require_trainable(messages, flags)

    prompt = _system(row, format)
    if prompt is not None and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": prompt})
        flags.insert(0, None)

    tools = tools_of(row, format)
    if b"\\ud" in payload or b"\\uD" in payload:  # an escape that may be half of a character
        require_encodable(messages, tools)
    template_kwargs = template_kwargs_of(row, format)
    return Conversation(tuple(messages), tools, tuple(flags), template_kwargs=template_kwargs)


def _parse(payload: bytes) -> dict[str, Any]:
    if len(payload) > _MAX_VALUES:  # most rows are much shorter
        _require_moderate(payload)
    if payload.startswith(_BOM):
        payload = payload[len(_BOM) :]
    try:
        row = ROW_DECODER.decode(payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        if payload.startswith(OVERSIZED_ROW):
            _reject_oversized(int(payload.removeprefix(OVERSIZED_ROW)))
        reject("malformed_json", f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        reject("malformed_json", f"{error.msg} at character {error.pos}")
    except ValueError:
        reject("malformed_json", "a number of too many digits")
    except RecursionError:
        reject("malformed_json", "nested too deeply")

    if type(row) is not dict:
        reject("not_an_object", f"the row is {type_of(row)}")
    return row


def _require_moderate(payload: bytes) -> None:
    """Reject a row that would take a loader's memory when it is decoded."""
    if len(payload) > MAX_ROW_BYTES:
        _reject_oversized(len(payload))
    if sum(map(payload.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        reject("malformed_json", f"lists and objects of more than {_MAX_VALUES:,} values")


def _reject_oversized(num_bytes: int) -> NoReturn:
    reject("too_long", f"{num_bytes:,} bytes of JSON, at most {MAX_ROW_BYTES:,}")


def _require_trainable(messages: Messages, flags: Flags) -> None:
    for message, flag in zip(messages, flags, strict=True):
        if flag is not False and message["role"] == "assistant":
            return
    reject(
        "nothing_to_train", f"none of {len(messages)} turns is an assistant's that may be trained"
    )


def _plain_text(row: Mapping[str, Any], format: RowFormat) -> Conversation:
    text = _text_of(row, "text", format)
    if text is None:
        reject("no_messages", _missing("text", format))
    if not text or text.isspace():
        reject("nothing_to_train", "the text is empty")
    if not is_encodable(text):
        reject("bad_message", "the text: half of a surrogate pair, which is not text")
    return Conversation((), None, (), text)


def _turns(row: Mapping[str, Any], format: RowFormat) -> list[Any]:
    """Return the turns of a row of the shape "messages": a list, or the JSON text of one."""
    column = column_of("messages", row, format.columns)
    if column is None:
        reject("no_messages", _missing("messages", format))
    turns = row[column]
    if type(turns) is str:
        turns = require_json(turns, f"column {column}", ROW_DECODER)
    if type(turns) is not list:
        reject("no_messages", f"column {column} is {type_of(turns)}, not a list")
    if not turns:
        reject("no_messages", f"column {column} is empty")
    return turns


def _alpaca(row: Mapping[str, Any], format: RowFormat) -> tuple[Messages, Flags]:
    instruction = _text_of(row, "instruction", format)
    context = _text_of(row, "input", format)
    output = _text_of(row, "output", format)
    if output is None:
        reject("no_messages", _missing("output", format))
    question = "\n".join(part for part in (instruction, context) if part)
    if not question:
        missing = _missing("instruction", format)
        reject("no_messages", f"neither instruction nor input: {missing}, or empty")

    messages: Messages = []
    for user, assistant in [*_history(row, format), (question, output)]:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return messages, [None] * len(messages)


def _history(row: Mapping[str, Any], format: RowFormat) -> list[Any]:
    """Return Alpaca's earlier exchanges, [user, assistant] each; they are trained like the last."""
    column = column_of("history", row, format.columns)
    if column is None:
        return []

    pairs = row[column]
    if type(pairs) is str:
        pairs = require_json(pairs, f"column {column}") if pairs.strip() else []
    if type(pairs) is not list:
        reject("bad_message", f"column {column} is {type_of(pairs)}, not a list")
    for number, pair in enumerate(pairs):
        if type(pair) is not list or len(pair) != 2 or not all(type(text) is str for text in pair):
            reject("bad_message", f"column {column}: entry {number} is not a list of two texts")
    return pairs


def _prompt_and_completion(row: Mapping[str, Any], format: RowFormat) -> tuple[Messages, Flags]:
    pair = pair_of(row, format.columns)
    if pair is None:
        reject(
            "no_messages",
            f"no columns {describe_pairs(format.columns)}, or one of them is null",
        )
    prompt, _ = _one_side(row, pair[0], "user", format)
    completion, flags = _one_side(row, pair[1], "assistant", format)

    # Whatever the prompt says of its turns, they are not trained.
    prompt_flags = [False if message["role"] == "assistant" else None for message in prompt]
    return prompt + completion, prompt_flags + flags


def _one_side(
    row: Mapping[str, Any], column: str, role: str, format: RowFormat
) -> tuple[Messages, Flags]:
    """Return the messages and flags of a prompt or completion: a text, or a list of messages.

    Args:
        role: of a text, which is one turn.
    """
    value = row[column]
    if type(value) is str:
        return [{"role": role, "content": value}], [None]
    if type(value) is list and value:
        return read_turns(value, f"column {column}, turn", format)
    if value == []:
        reject("no_messages", f"column {column} is empty")
    reject(
        "bad_message", f"column {column} is {type_of(value)}, neither text nor a list of messages"
    )


def _system(row: Mapping[str, Any], format: RowFormat) -> str | None:
    """Return the system turn that a column holds; None if there is none, or it is empty."""
    for column in possible_columns("system", format.columns):
        if value := row.get(column):
            if type(value) is not str:
                reject("bad_message", f"column {column} is {type_of(value)}, not text")
            return value
    return None


def _text_of(row: Mapping[str, Any], field: str, format: RowFormat) -> str | None:
    """Return the text of a field; None if there is no column for it, or it is null."""
    column = column_of(field, row, format.columns)
    if column is None:
        return None
    text = row[column]
    if type(text) is not str:
        reject("bad_message", f"column {column} is {type_of(text)}, not text")
    return text


def _missing(field: str, format: RowFormat) -> str:
    return f"no column {' or '.join(possible_columns(field, format.columns))}, or it is null"
