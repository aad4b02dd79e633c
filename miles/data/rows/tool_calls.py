"""Tool calls of a row -> OpenAI's, with arguments as objects, as chat templates expect them.

    {"name": "f", "arguments": "{\\"x\\": 1}"}         ->  {"name": "f", "arguments": {"x": 1}}
    a `tool_call` turn with the call as text         ->  [{"type": "function", "function": {…}}]
    {"type": "tool_use", "name": "f", "input": {…}}  ->  the same

Arguments that are "", blank or null are `{}`. The text of an object may have been encoded twice.
A row whose arguments are anything else is dropped as `bad_tool_call`: they would be trained. So is
one whose arguments may stand under a key that is not read, or that has other ones in two places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from miles.common.shown import cut
from miles.data.rows.json_text import has_no_finite_form, read_json
from miles.data.rows.reject import reject, type_of
from miles.data.rows.train_flags import TRAIN_FLAGS, train_flag

_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
"""The keys of a call's arguments, by the custom of its tool."""
_NOT_READ = frozenset(
    (
        *("kwargs", "args_json", "arguments_json", "argument", "params", "parameter"),
        *("action_input", "tool_input", "function_args", "function_arguments"),
    )
)
"""Keys where some calls have arguments, too; with them, a call is not understood."""
_HARMLESS = frozenset(
    (
        *("id", "type", "index", "name", "function", "strict"),
        *("call_id", "tool_call_id", "status", "caller"),
    )
)
"""Keys of a call that cannot be arguments of it."""
_CALL_KEYS = ("id", "type", "function", "name", "arguments")
_BAD = "bad_tool_call"
_MAX_KEY = 40
_PLAIN = frozenset((str, int, bool, type(None)))


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
        function = _read(call, function, f"{where}: function call {number}")
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
        function = _read(call, function, f"{where}: tool call {number}")
        is_flat = call.get("function") is None
        tool_calls.append(function if is_flat else _whole_call(call, function))
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
        if not _PLAIN.issuperset(map(type, value.values())) and has_no_finite_form(value):
            reject(_BAD, f"{where}: its arguments have a number that JSON does not have")
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


def _whole_call(call: dict[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    """Return a call around its function, without flags of training."""
    further = {key: value for key, value in call.items() if key not in TRAIN_FLAGS}
    return _in_order(further | {"function": function})


def _read(call: Mapping[str, Any], function: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a new object of a call's function, when the call is understood.

    Args:
        call: around the function, or the function itself.
    """
    if call is not function and not _HARMLESS.issuperset(call):
        beside = [key for key in call if key not in _HARMLESS and _is_filled(call[key])]
        if beside:
            _require_understood(call, function, beside, where)
    return with_arguments(function, where)


def _require_understood(
    call: Mapping[str, Any], function: Mapping[str, Any], beside: list[str], where: str
) -> None:
    """Reject a call that may have arguments beside its function, or that is not trained.

    Args:
        beside: keys of the call that are not known, and not empty.
    """
    if any(function.get(key) is not None for key in _ARGUMENT_KEYS):
        not_read = _NOT_READ.union(_ARGUMENT_KEYS)
    else:
        not_read = frozenset(beside) - frozenset(TRAIN_FLAGS)
    for key in beside:
        if key in not_read:
            _reject_key(key, "stands beside function, not in it", where)
    _require_trained(call, where)


def with_arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a new object of a call's function, with arguments, whichever key they stood under."""
    if len(function) == 2 and "arguments" in function:  # most
        arguments = tool_arguments(function["arguments"], where)
        return {"name": function["name"], "arguments": arguments}

    used = [key for key in _ARGUMENT_KEYS if function.get(key) is not None]
    arguments = tool_arguments(function[used[0]], where) if used else {}
    for key in used[1:]:
        if tool_arguments(function[key], where) != arguments:
            _reject_key(key, f"differs from {used[0]}", where)
    for key, value in function.items():
        is_lost = key in _NOT_READ if used else key not in _HARMLESS
        if is_lost and _is_filled(value):
            _reject_key(key, "may hold arguments, and is not read", where)

    _require_trained(function, where)
    unused = (*_ARGUMENT_KEYS, *TRAIN_FLAGS)
    further = {key: value for key, value in function.items() if key not in unused}
    return _in_order(further | {"arguments": arguments})


def _reject_key(key: str, fault: str, where: str) -> NoReturn:
    quoted = json.dumps(cut(key, _MAX_KEY))
    reject(_BAD, f"{where}: its key {quoted} {fault}; expected all arguments under arguments")


def _require_trained(call: Mapping[str, Any], where: str) -> None:
    if train_flag(call, where) is False:
        reject("partial_turn", f"{where} is flagged as not trained; only whole turns can be")


def _is_filled(value: Any) -> bool:
    """Return whether a value says something: it is not null, blank or empty."""
    if type(value) is str:
        return bool(value.strip())
    return value is not None and value not in ([], {})


def _in_order(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with its keys in one order, whatever the file's: some templates print it."""
    return {key: call[key] for key in _CALL_KEYS if key in call} | call
