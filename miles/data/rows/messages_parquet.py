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

The columns are made whole, column by column: most messages have a role and a content, and cost no
object here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from miles.common.offsets import offsets_of
from miles.data.step_schemas import MESSAGES
from miles.data.types import EXTRA, Conversation, Int32, Int64

_TEXT_FIELDS = ("reasoning_content", "name", "tool_call_id")
_FURTHER_FIELDS = (*_TEXT_FIELDS, "tool_calls", EXTRA)
_PLAIN_KEYS = 2
"""Every message has a role and a content; one with as many keys has nothing else."""
_LIST = MESSAGES.field("messages").type


def messages_table(
    row_ids: Int64, source_ids: Int32, source_names: Sequence[str], rows: Sequence[Conversation]
) -> pa.Table:
    """Return conversations as a table of `MESSAGES`.

    Args:
        row_ids: int64 [rows].
        source_ids: int32 [rows].
        source_names: of all sources.
        rows: the conversations.
    """
    names = pa.array(source_names, pa.string())
    columns = {
        "row_id": pa.array(row_ids, pa.int64()),
        "source": names.take(pa.array(source_ids)),
        "messages": _messages_column(rows),
        "tools": pa.array([_json_or_null(row.tools) for row in rows], pa.string()),
        "chat_template_kwargs": pa.array(
            [_json_or_null(row.template_kwargs) for row in rows], pa.string()
        ),
        "text": pa.array([row.text for row in rows], pa.string()),
    }
    return pa.Table.from_pydict(columns, schema=MESSAGES)


def _messages_column(rows: Sequence[Conversation]) -> pa.Array:
    """Return the messages of conversations: a list for each, null for a plain text."""
    messages = list(chain.from_iterable(row.messages for row in rows))
    flags = chain.from_iterable(row.flags for row in rows)
    further = [
        _further_fields(message) if len(message) > _PLAIN_KEYS else {} for message in messages
    ]
    columns: dict[str, list[Any]] = {
        "role": [message["role"] for message in messages],
        "content": [message["content"] for message in messages],
        "weight": [None if flag is None else int(flag) for flag in flags],
    }
    for name in _FURTHER_FIELDS:
        columns[name] = [fields.get(name) for fields in further]

    fields = [pa.array(columns[field.name], field.type) for field in _LIST.value_type]
    values = pa.StructArray.from_arrays(fields, fields=list(_LIST.value_type))
    offsets = offsets_of([len(row.messages) for row in rows]).astype(np.int32)
    is_text = pa.array([row.text is not None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=_LIST, mask=is_text)


def _json_or_null(value: Any) -> str | None:
    return json.dumps(value, ensure_ascii=False) if value else None


def _further_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's other fields; whatever they cannot hold exactly is in `EXTRA`."""
    written: dict[str, Any] = {}
    extra = {}
    for key, value in message.items():
        if key in ("role", "content"):
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
