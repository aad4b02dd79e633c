"""The tools of a row, in all the forms that people have -> a list of objects, or none.

    [{"type": "function", …}, …]            as they are; each may be JSON text
    '[{"type": "function", …}]'             JSON text of a list
    {"type": "function", …}                 one tool, as an object or as JSON text
    "None", "null", "", "[]", null          no tools
    {"name": …, "input_schema": {…}}        Anthropic's  ->  {"type": "function", "function": {…}}
    `functions`: [{"name": …}, …]           OpenAI's from before tools  ->  the same
    `metadata`: {"tools": […]}              tools within an object, or within its JSON text

A tool's `parameters` that are the JSON text of an object become that object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.config import RowFormat
from miles.data.files.row_columns import TOOLS_WITHIN, possible_columns
from miles.data.rows.json_text import read_json, require_json, require_shallow
from miles.data.rows.reject import reject, type_of

Tools = tuple[Mapping[str, Any], ...]

_NOTHING = frozenset(("", "none", "null"))
_FUNCTIONS = "functions"


def tools_of(row: Mapping[str, Any], format: RowFormat) -> Tools | None:
    """Return the tools of a row; None if it has none."""
    for column in possible_columns("tools", format.columns):
        value = row.get(column)
        if value is not None:
            tools = _tools(value, column)
            if tools:
                return tuple(tools)

    if "tools" not in format.columns and row.get(TOOLS_WITHIN) is not None:
        return _tools_of_metadata(row[TOOLS_WITHIN])
    return None


def shows_tools(messages: Sequence[Mapping[str, Any]], tools: Tools) -> bool:
    """Return whether a system turn lists the tools in its own text, between <tools> and </tools>.

    The template would write them a second time. A list begins with a bracket, or names a tool.
    """
    for message in messages:
        if message["role"] == "system":
            for after in message["content"].split("<tools>")[1:]:
                shown, closed, _ = after.partition("</tools>")
                if closed and _is_list_of_tools(shown.strip(), tools):
                    return True
    return False


def _is_list_of_tools(text: str, tools: Tools) -> bool:
    if text.startswith(("[", "{")):
        return True
    functions = [tool.get("function", tool) for tool in tools]
    names = [function.get("name") for function in functions if type(function) is dict]
    return any(type(name) is str and bool(name) and name in text for name in names)


def _tools(value: Any, column: str) -> list[dict[str, Any]]:
    """Return the tools of a column; an empty list for none."""
    require_shallow(value, f"column {column}")
    for _ in range(2):  # it may have been encoded twice
        if type(value) is str:
            has_text = value.strip()[:5].casefold() not in _NOTHING
            value = require_json(value, f"column {column}") if has_text else []
    if value is None:
        return []
    if type(value) is dict and _is_tool(value):
        value = [value]
    if type(value) is not list:
        reject("bad_message", f"the tools are {type_of(value)}, not a list")
    return [_tool(tool, number, column) for number, tool in enumerate(value)]


def _tool(tool: Any, number: int, column: str) -> dict[str, Any]:
    """Return one tool as an object."""
    if type(tool) is str:
        tool = require_json(tool, f"tool {number}")
    if type(tool) is not dict:
        reject("bad_message", f"tool {number} is {type_of(tool)}, not an object")

    if type(tool.get("function")) is dict:
        return tool | {"function": _with_schema(tool["function"])}
    tool = _with_schema(tool)
    if type(tool.get("name")) is not str:
        return tool
    if "input_schema" in tool:
        parameters = {"parameters": tool["input_schema"]}
        further = {key: item for key, item in tool.items() if key not in ("type", "input_schema")}
        return {"type": "function", "function": further | parameters}
    if column == _FUNCTIONS:
        return {"type": "function", "function": tool}
    return tool


def _with_schema(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function whose parameters are an object where they were the JSON text of one."""
    text = function.get("parameters")
    if type(text) is not str or not text.lstrip().startswith("{"):
        return function
    try:
        schema = read_json(text)
    except ValueError:
        reject("malformed_json", "the parameters of a tool are text that is not JSON")
    return function | {"parameters": schema}


def _tools_of_metadata(metadata: Any) -> Tools | None:
    """Return the tools that stand within `metadata`; None where it speaks of something else."""
    if type(metadata) is str:
        if '"tools"' not in metadata:
            return None
        metadata = require_json(metadata, f"column {TOOLS_WITHIN}")
    tools = metadata.get("tools") if type(metadata) is dict else None

    is_list = type(tools) is list and all(map(_is_tool, tools))
    is_text = type(tools) is str and tools.lstrip().startswith(("[", "{"))
    if tools and (is_list or is_text):
        return tuple(_tools(tools, TOOLS_WITHIN)) or None
    return None


def _is_tool(value: Any) -> bool:
    """Return whether a value looks like a tool: an object with a function, or with a name."""
    if type(value) is str:
        return value.lstrip().startswith("{")
    return type(value) is dict and ("function" in value or "name" in value)
