"""Tool calls of a row -> OpenAI's, with arguments as objects, as chat templates expect them.

    {"name": "f", "arguments": "{\\"x\\": 1}"}         ->  {"name": "f", "arguments": {"x": 1}}
    a `tool_call` turn with the call as text         ->  [{"type": "function", "function": {…}}]
    {"type": "tool_use", "name": "f", "input": {…}}  ->  the same

Arguments that are "", blank or null are `{}`. The text of an object may have been encoded twice.
A row whose arguments are anything else is dropped as `bad_tool_call`: they would be trained.
"""

from __future__ import annotations

import json
from typing import Any

from miles.data.rows.json_text import read_json
from miles.data.rows.reject import reject, type_of

_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
"""Where a call has its arguments, by the custom of its tool; the first that is not null is taken."""
_CALL_KEYS = ("id", "type", "function", "name", "arguments")
_BAD = "bad_tool_call"


def function_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls of a turn that is a call, or of a message's `function_call`.

    Args:
        value: `{"name", "arguments"}` or a list of them, as an object or as JSON text.
        where: the turn's place in the row, for the detail of a reject.
    """
    calls = value
    if type(value) is str:
        try:
            calls = read_json(value)
        except ValueError:
            reject("bad_message", f"{where}: the function call is not JSON")
    calls = calls if type(calls) is list else [calls]
    if not calls:
        reject("bad_message", f"{where}: the list of function calls is empty")

    tool_calls = []
    for number, call in enumerate(calls):
        function = _function_of(call)
        if function is None:
            reject("bad_message", f"{where}: function call {number} is not an object with a name")
        function = _with_arguments(function, f"{where}: function call {number}")
        id = call.get("id")
        for key in ("id", "type"):  # of a call without `function` around name and arguments
            function.pop(key, None)
        tool_calls.append(new_call(function, id))
    return tool_calls


def openai_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the `tool_calls` of an OpenAI message, with arguments as objects and keys in order.

    Args:
        calls: a list of calls, with or without a `function` around name and arguments.
        where: the turn's place in the row, for the detail of a reject.
    """
    if type(calls) is str:  # of a column that holds JSON text
        try:
            calls = read_json(calls)
        except ValueError:
            reject("bad_message", f"{where}: tool_calls is text that is not JSON")
    if type(calls) is not list:
        reject("bad_message", f"{where}: tool_calls is {type_of(calls)}, not a list")

    tool_calls = []
    for number, call in enumerate(calls):
        function = _function_of(call)
        if function is None:
            reject("bad_message", f"{where}: tool call {number} has no function with a name")
        function = _with_arguments(function, f"{where}: tool call {number}")
        is_flat = call.get("function") is None
        tool_calls.append(function if is_flat else _in_order(call | {"function": function}))
    return tool_calls


def new_call(function: dict[str, Any], id: Any = None) -> dict[str, Any]:
    """Return an OpenAI tool call."""
    call = {"type": "function", "function": function}
    return call if id is None else {"id": id, **call}


def tool_arguments(value: Any, where: str) -> dict[str, Any]:
    """Return a call's arguments as an object.

    OpenAI's rows hold JSON text, which servers parse before they render: `'{"x": null}'` becomes
    the object, null included.

    Args:
        where: the call's place in the row, for the detail of a reject.
    """
    if type(value) is dict:
        return value
    if value is None:
        return {}
    if type(value) is not str:
        reject(_BAD, f"{where}: its arguments are {type_of(value)}, not an object")

    parsed = _parsed(value, where)
    if type(parsed) is str:  # encoded twice
        parsed = _parsed(parsed, where)
    if parsed is None:
        return {}
    if type(parsed) is not dict:
        reject(_BAD, f"{where}: its arguments are the JSON text of {type_of(parsed)}")
    return parsed


def _parsed(text: str, where: str) -> Any:
    """Return the value of JSON text; null for blank text."""
    if not text.strip():
        return None
    try:
        parsed = read_json(text)
        json.dumps(parsed, allow_nan=False)
    except json.JSONDecodeError as error:
        reject(
            _BAD,
            f"{where}: its arguments are text that is not JSON: {error.msg} at character "
            f"{error.pos} of {len(text)}",
        )
    except ValueError:
        reject(
            _BAD,
            f"{where}: its arguments are JSON text nested too deeply, or with a number or half of "
            "a character that JSON does not have",
        )
    return parsed


def _function_of(call: Any) -> dict[str, Any] | None:
    """Return the object with a call's name and arguments; None if there is none."""
    if type(call) is not dict:
        return None
    function = call.get("function")
    function = call if function is None else function
    if type(function) is not dict or type(function.get("name")) is not str:
        return None
    return function


def _with_arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a new object of a call's function, with arguments, whichever key they stood under."""
    if len(function) == 2 and "arguments" in function:  # most
        arguments = tool_arguments(function["arguments"], where)
        return {"name": function["name"], "arguments": arguments}

    for key in _ARGUMENT_KEYS:
        if function.get(key) is not None:
            arguments = tool_arguments(function[key], where)
            further = {name: value for name, value in function.items() if name != key}
            return _in_order(further | {"arguments": arguments})
    return _in_order(function | {"arguments": {}})


def _in_order(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its keys in one order, whatever the file's: some templates print it."""
    return {key: call[key] for key in _CALL_KEYS if key in call} | call
