"""Conversations -> rows of Parquet, as `Prepared.write` makes them and `normalize` reads them back.

    column     of a conversation                                    of a plain text
    messages   [{role: user, content: 2+2?, …},                     null
                {role: assistant, content: "4", weight: 0, …}]
    tools      JSON                                                 null
    chat_template_kwargs  JSON                                      null
    text       null                                                 …

Arguments of tool calls are JSON text, as OpenAI has them, and read back to the object that they
were. A key of a message that has no column, or a value that its column cannot hold exactly, goes
into the JSON object `extra`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from miles.data.rows.turns import EXTRA

_FUNCTION = pa.struct([("name", pa.string()), ("arguments", pa.string())])
_CALL = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", _FUNCTION)])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("tool_calls", pa.list_(_CALL)),
        # JSON: an object of the keys that have no field of their own above.
        (EXTRA, pa.string()),
        # 1 or 0: the row flags this turn as trained or not; null: it has no flag.
        ("weight", pa.int8()),
    ]
)
_TEXT_FIELDS = ("reasoning_content", "name", "tool_call_id")
WRITTEN = pa.schema(
    [
        ("row_id", pa.int64()),
        ("source", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("tools", pa.string()),  # JSON
        ("chat_template_kwargs", pa.string()),  # JSON
        ("text", pa.string()),
    ]
)
"""The columns. A row has messages or a text."""


class ToMessages:
    """Turns PREPARED_STEP rows into a table of `WRITTEN`."""

    def __init__(self, source_names: tuple[str, ...]) -> None:
        self.source_names = source_names

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for step in table.to_pylist():
            samples = zip(
                step["sample_row_ids"],
                step["sample_source_ids"],
                step["conversations"],
                strict=True,
            )
            for row_id, source_id, text in samples:
                written = _written_row(json.loads(text))
                rows.append({"row_id": row_id, "source": self.source_names[source_id], **written})
        return pa.Table.from_pylist(rows, schema=WRITTEN)


def _written_row(conversation: dict[str, Any]) -> dict[str, Any]:
    if conversation["text"] is not None:
        return {"text": conversation["text"]}

    messages = []
    for message, flag in zip(conversation["messages"], conversation["flags"], strict=True):
        weight = None if flag is None else int(flag)
        messages.append(_written_message(message) | {"weight": weight})

    tools = conversation["tools"]
    variables = conversation["template_kwargs"]
    return {
        "messages": messages,
        "tools": json.dumps(tools, ensure_ascii=False) if tools else None,
        "chat_template_kwargs": json.dumps(variables, ensure_ascii=False) if variables else None,
    }


def _written_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `_MESSAGE`; whatever they cannot hold exactly is in `EXTRA`."""
    written: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    extra = {}
    for key, value in message.items():
        if key in written:
            continue
        if key in _TEXT_FIELDS and isinstance(value, str):
            written[key] = value
        elif key == "tool_calls" and all(_is_plain_call(call) for call in value):
            written[key] = [_written_call(call) for call in value]
        else:
            extra[key] = value

    if extra:
        written[EXTRA] = json.dumps(extra, ensure_ascii=False)
    return written


def _is_plain_call(call: Mapping[str, Any]) -> bool:
    """Return whether a call reads back from `_CALL` as it is.

    It may have no other keys, ids and types must be text, and JSON must hold the arguments exactly.
    """
    function = call.get("function")
    return (
        set(call) <= {"id", "type", "function"}
        and all(isinstance(call.get(key, ""), str) for key in ("id", "type"))
        and isinstance(function, dict)
        and set(function) == {"name", "arguments"}
    )


def _written_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = _arguments_text(function["arguments"])
    return {
        "id": call.get("id"),
        "type": call.get("type"),
        "function": {"name": function["name"], "arguments": arguments},
    }


def _arguments_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
