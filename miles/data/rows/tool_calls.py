"""Tools and tool calls of a row, as chat templates expect them.

    {"name": "f", "arguments": "{\\"x\\": 1}"}       ->  {"name": "f", "arguments": {"x": 1}}
    a `function_call` turn with the call as text    ->  [{"type": "function", "function": {…}}]
    tools as JSON text, or a list of texts          ->  a list of objects

JSON text stays as its author wrote it, nulls included. In objects a null is as good as absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from miles.data.config import RowFormat
from miles.data.files.row_columns import column_of
from miles.data.rows.json_text import read_json, require_json, without_nulls
from miles.data.rows.reject import reject, type_of

_CALL_KEYS = ("id", "type", "function", "name", "arguments")


def function_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls of ShareGPT's `function_call` turn as OpenAI tool calls.

    Args:
        value: `{"name", "arguments"}` or a list of them, as an object or as JSON text.
        where: the turn's place in the row, for the detail of a reject.
    """
    try:
        calls = read_json(value) if type(value) is str else without_nulls(value, where)
    except ValueError:
        reject("bad_message", f"{where}: the function call is not JSON")
    calls = calls if type(calls) is list else [calls]
    if not calls:
        reject("bad_message", f"{where}: the list of function calls is empty")

    tool_calls = []
    for number, call in enumerate(calls):
        if type(call) is not dict or type(call.get("name")) is not str:
            reject("bad_message", f"{where}: function call {number} is not an object with a name")
        function = {"name": call["name"], "arguments": tool_arguments(call.get("arguments"))}
        tool_calls.append({"type": "function", "function": function})
    return tool_calls


def openai_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the `tool_calls` of an OpenAI message, with arguments as objects and keys in order.

    Args:
        calls: a list of calls, with or without a `function` around name and arguments.
        where: the turn's place in the row, for the detail of a reject.
    """
    if type(calls) is not list:
        reject("bad_message", f"{where}: tool_calls is {type_of(calls)}, not a list")

    tool_calls = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if type(call) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            reject("bad_message", f"{where}: tool call {number} has no function with a name")
        function["arguments"] = tool_arguments(function.get("arguments"))
        if "function" in call:
            call = call | {"function": _in_order(function)}
        tool_calls.append(_in_order(call))
    return tool_calls


def tool_arguments(value: Any) -> Any:
    """Return a call's arguments as chat templates expect them.

    OpenAI's rows hold JSON text, which servers parse before they render: `'{"x": null}'` becomes
    the object, null included. Text that is not the JSON of an object (or needs NaN, Infinity) stays
    text. No arguments are an empty object.
    """
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


def tools_of(row: Mapping[str, Any], format: RowFormat) -> tuple[Mapping[str, Any], ...] | None:
    """Return the tools of a row; None if it has none."""
    column = column_of("tools", row, format.columns)
    if column is None:
        return None

    value = row[column]
    is_text = type(value) is str
    if is_text:
        value = require_json(value, f"column {column}") if value.strip() else None
    if value is None or value == []:
        return None
    if type(value) is not list:
        reject("bad_message", f"the tools are {type_of(value)}, not a list")

    tools = []
    for number, tool in enumerate(value):
        if type(tool) is str:
            tool = require_json(tool, f"tool {number}")
        elif not is_text:
            tool = without_nulls(tool, f"tool {number}")
        if type(tool) is not dict:
            reject("bad_message", f"tool {number} is {type_of(tool)}, not an object")
        tools.append(tool)
    return tuple(tools)


def _in_order(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its keys in one order, whatever the file's: some templates print it."""
    return {key: call[key] for key in _CALL_KEYS if key in call} | call
