"""A conversation that is written as one text -> messages.

    "\\n\\nHuman: 2+2?\\n\\nAssistant: 4"                    HH's
    "USER: 2+2?\\n\\n\\nASSISTANT: 4 <|endoftext|>\\n\\n\\n"  Glaive's, with FUNCTION RESPONSE: and calls
    "### Human: 2+2?### Assistant: 4"                       Guanaco's
    ->  user "2+2?", assistant "4"

The first name of a speaker tells which of them a text is. Blanks around what is said, and Glaive's
end-of-text mark behind an answer, are the transcript's and not the speaker's. What stands before
the first name would be lost, so that a text that does not begin with one is no transcript.

Glaive calls a function by `<functioncall> {"name": "f", "arguments": '{"x": 1}'}`, and its system
text announces the functions; both become what a chat template has for them (`with_announced_tools`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from miles.data.rows.json_text import read_json
from miles.data.rows.reject import reject
from miles.data.rows.tool_calls import function_calls
from miles.data.rows.turns import Messages

_FORMS = (
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant|System):"),
    re.compile(r"(?:\A\s*|\n\n+)(USER|ASSISTANT|FUNCTION RESPONSE|SYSTEM):"),
    re.compile(r"(?:\A\s*|\n*)### (Human|Assistant|System):"),
)
_ROLES = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "function response": "tool",
}
_END_OF_TEXT = "<|endoftext|>"
_CALL = "<functioncall>"
_QUOTED_CALL = re.compile(
    r"""\{\s*"name":\s*("(?:[^"\\]|\\.)*"),\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL
)
"""A call whose arguments stand in single quotes, which is no JSON."""
_ANNOUNCEMENT = re.compile(
    r"\s*with access to the following functions\. Use them if required\s*-?\s*"
)


def read_transcript(text: str, what: str) -> Messages:
    """Return the messages of a transcript.

    Args:
        what: the text's name in the detail of a reject, such as "column chat".
    """
    for form in _FORMS:
        marks = list(form.finditer(text))
        if not marks or text[: marks[0].start()].strip():
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        return [
            _message(mark[1].lower(), text[mark.end() : end], f"{what}, turn {number}")
            for number, (mark, end) in enumerate(zip(marks, ends, strict=True))
        ]
    reject(
        "no_messages",
        f"{what} does not begin with a speaker's name: Human:, USER: or ### Human:",
    )


def without_cue(messages: Messages) -> Messages:
    """Return messages without an empty answer at their end: the cue for the answer to come."""
    if messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        return messages[:-1]
    return messages


def with_announced_tools(
    system: str, tools: tuple[Mapping[str, Any], ...] | None
) -> tuple[str, tuple[Mapping[str, Any], ...] | None]:
    """Return a system text without the functions that it announces, and these as tools.

    A text that announces none, or not as JSON objects to its end, stays as it is; and so it does
    beside tools of the row's own.

    Args:
        tools: of the row's own.
    """
    text = system.removeprefix("SYSTEM:").strip()
    announcement = _ANNOUNCEMENT.search(text)
    functions = [] if announcement is None else _objects(text[announcement.end() :])
    if announcement is None or tools is not None or not functions:
        return text, tools

    announced = [{"type": "function", "function": function} for function in functions]
    return text[: announcement.start()].rstrip(), tuple(announced)


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects that a text consists of; none where it has anything else."""
    decoder = json.JSONDecoder()
    objects: list[dict[str, Any]] = []
    rest = text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        if type(value) is not dict or type(value.get("name")) is not str:
            return []
        objects.append(value)
        rest = rest[end:].lstrip()
    return objects


def _message(speaker: str, text: str, where: str) -> dict[str, Any]:
    role = _ROLES[speaker]
    text = text.strip()
    if role != "assistant":
        return {"role": role, "content": text}

    text = text.removesuffix(_END_OF_TEXT).rstrip()
    said, mark, call = text.partition(_CALL)
    if not mark:
        return {"role": role, "content": text}
    calls = function_calls(_call(call.strip(), where), where)
    return {"role": role, "content": said.rstrip(), "tool_calls": calls}


def _call(text: str, where: str) -> dict[str, Any]:
    """Return the name and the arguments of a call as its author wrote it."""
    quoted = _QUOTED_CALL.fullmatch(text)
    try:
        if quoted is None:
            call = read_json(text)
        else:
            call = {"name": json.loads(quoted[1]), "arguments": _arguments(quoted[2])}
    except (ValueError, RecursionError):
        reject("bad_tool_call", f"{where}: the function call is not JSON")
    if type(call) is not dict:
        reject("bad_tool_call", f"{where}: the function call is no object")
    return call


def _arguments(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError:
        return read_json(text.replace("\\'", "'"))  # an apostrophe within single quotes
