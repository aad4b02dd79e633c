"""Rows with a question and its answer in columns of their own -> messages and flags.

    alpaca             pairs of the history, then instruction + "\\n" + input -> output
                       (no newline if one of the two is empty)
    prompt_completion  two texts; or two lists of messages, where only the completion's are trained
    preference         the chosen conversation; or the prompt and the chosen answer

A column of reasoning becomes the answer's `reasoning_content`, unless the answer has thoughts of
its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from miles.common.json_faults import described, likely_fault
from miles.data.config import RowFormat
from miles.data.files.row_columns import (
    column_of,
    describe_pairs,
    pair_of,
    possible_columns,
    prompt_of,
    reasoning_of,
)
from miles.data.files.turn_values import ROLE_KEYS, has_turns, is_transcript, is_turn
from miles.data.rows.json_text import ROW_DECODER, read_json, require_json
from miles.data.rows.reject import reject, type_of
from miles.data.rows.roles import find_role
from miles.data.rows.tool_calls import function_calls
from miles.data.rows.transcripts import read_transcript, without_cue
from miles.data.rows.turn_forms import first_key
from miles.data.rows.turn_lists import turn_list
from miles.data.rows.turns import Flags, Messages, read_turns

CALLS = "answers"
"""A completion's column that may hold calls of the row's tools as JSON text, as xLAM's does."""
_THOUGHTS_END = "</think>"
_CALLS_BEGIN = re.compile(r"""\s*\[?\s*\{\s*["']""")
"""The beginning of the text of calls, as JSON or as Python writes it."""
_RENDERED = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>)?\s*"
    r"(?:<\|im_start\|>(?:system|user|assistant)\b"
    r"|<\|start_header_id\|>(?:system|user|assistant)<"
    r"|<start_of_turn>(?:user|model)\b"
    r"|\[INST\].*\[/INST\]\s*$)",
    re.DOTALL,
)
"""The beginning of a prompt that a chat template has rendered."""


def alpaca(row: Mapping[str, Any], format: RowFormat) -> tuple[Messages, Flags]:
    """Return the messages and flags of a row of the shape "alpaca"."""
    instruction = text_of(row, "instruction", format)
    context = text_of(row, "input", format)
    output = text_of(row, "output", format)
    if output is None:
        reject("no_messages", missing("output", format))
    question = "\n".join(part for part in (instruction, context) if part)
    if not question:
        reason = missing("instruction", format)
        reject("no_messages", f"neither instruction nor input: {reason}, or empty")

    messages: Messages = []
    for user, assistant in [*_history(row, format), (question, output)]:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    _add_reasoning(messages, row, format)
    return messages, [None] * len(messages)


def prompt_and_completion(row: Mapping[str, Any], format: RowFormat) -> tuple[Messages, Flags]:
    """Return the messages and flags of a row of the shape "prompt_completion"."""
    pair = pair_of(row, format.columns)
    if pair is None:
        reject(
            "no_messages",
            f"no columns {describe_pairs(format.columns)}, or one of them is null",
        )
    prompt, _ = _one_side(row, pair[0], "user", format)
    is_chat = type(row[pair[0]]) is not str or _is_chat_text(row[pair[0]], format)
    completion, flags = _one_side(row, pair[1], "assistant", format, is_chat=is_chat)
    if completion[0]["role"] != "assistant":
        completion, flags = _without_prompt(prompt, completion, flags)
    if len(completion) == 1:
        _add_reasoning(completion, row, format)
    return prompt + completion, _never_trained(prompt) + flags


def preference(row: Mapping[str, Any], format: RowFormat) -> tuple[Messages, Flags]:
    """Return the chosen conversation of a row of the shape "preference".

    The chosen side is a whole conversation, which then has the prompt's turns, too; or it is the
    answer to the prompt.
    """
    column = column_of("chosen", row, format.columns)
    if column is None:
        reject("no_messages", missing("chosen", format))
    chosen, flags = _conversation(row, column, "assistant", format)

    prompt = _question(row, format)
    first = next((message["role"] for message in chosen if message["role"] != "system"), None)
    if first == "user":
        _require_contained(prompt, chosen, column)
        return chosen, flags
    if not prompt:
        reject("no_messages", f"column {column} is an answer, and no column holds its question")
    return prompt + chosen, _never_trained(prompt) + flags


def conversation_of(row: Mapping[str, Any], format: RowFormat) -> tuple[Messages, Flags]:
    """Return the messages and flags of a row of the shape "transcript"."""
    column = column_of("transcript", row, format.columns)
    if column is None:
        reject("no_messages", missing("transcript", format))
    if type(row[column]) is not str:
        reject("no_messages", f"column {column} is {type_of(row[column])}, not text")
    messages = read_transcript(row[column], f"column {column}")
    return messages, [None] * len(messages)


def text_of(row: Mapping[str, Any], field: str, format: RowFormat) -> str | None:
    """Return the text of a field; None if there is no column for it, or it is null."""
    column = column_of(field, row, format.columns)
    if column is None:
        return None
    text = row[column]
    if type(text) is not str:
        reject("bad_message", f"column {column} is {type_of(text)}, not text")
    return text


def missing(field: str, format: RowFormat) -> str:
    """Return that a field has no column, for the detail of a reject."""
    return f"no column {' or '.join(possible_columns(field, format.columns))}, or it is null"


def calls_tools(row: Mapping[str, Any], format: RowFormat) -> bool:
    """Return whether a row's answer is a list of calls that stand for themselves, as xLAM's."""
    pair = pair_of(row, format.columns)
    return pair is not None and _calls(row, pair[1], format) is not None


def as_functions(tools: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    """Return tools as servers take them: a bare one, by name, in a function object.

    What it has of parameters stays as its author wrote it, JSON schema or not.
    """
    functions = []
    for tool in tools:
        is_bare = type(tool.get("name")) is str and "function" not in tool
        functions.append({"type": "function", "function": tool} if is_bare else tool)
    return tuple(functions)


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


def _one_side(
    row: Mapping[str, Any], column: str, role: str, format: RowFormat, *, is_chat: bool = True
) -> tuple[Messages, Flags]:
    """Return the messages and flags of a prompt or completion: a text, or a list of messages.

    Args:
        role: of a text, which is one turn.
        is_chat: JSON text of any messages is these messages; else it is where the assistant alone
            speaks in it, and a text that an answer may well be where others do.
    """
    value = row[column]
    calls = _calls(row, column, format) if role == "assistant" else None
    if calls is not None:
        tool_calls = function_calls(calls, f"column {column}")
        return [{"role": role, "content": "", "tool_calls": tool_calls}], [None]
    if type(value) is str and role == "user" and _RENDERED.match(value) is not None:
        reject(
            "bad_message",
            f"column {column} was rendered by a chat template beforehand, and would be rendered "
            "again. Give the plain question; or join the question and its answer in one column, "
            "text",
        )
    if type(value) is str and not _is_chat_text(value, format, is_answer=not is_chat):
        return [{"role": role, "content": value}], [None]
    is_texts = type(value) is list and bool(value) and type(value[0]) is str
    if type(value) not in (str, list, dict) or is_texts:  # texts are several answers, not turns
        reject(
            "bad_message",
            f"column {column} is {type_of(value)}, neither text nor a list of messages",
        )

    turns = turn_list(value, column)
    return read_turns(turns, f"column {column}, turn", format)


def _is_chat_text(text: str, format: RowFormat, *, is_answer: bool = False) -> bool:
    """Return whether a text is the JSON of a list of messages, each with a role that is known.

    Args:
        is_answer: only the assistant's messages count.
    """
    if text.lstrip()[:1] != "[" or not has_turns(text):  # most texts
        return False
    for turn in json.loads(text):
        key = first_key(turn, ROLE_KEYS) if is_turn(turn) else None
        role = None if key is None else find_role(turn[key], format.roles)
        if role is None or (is_answer and role != "assistant"):
            return False
    return True


def _without_prompt(prompt: Messages, completion: Messages, flags: Flags) -> tuple[Messages, Flags]:
    """Return a completion without the prompt's turns, where it is the whole conversation."""
    asked = [message for message in prompt if message["role"] != "system"]
    for begin in (prompt, asked):
        if begin and len(completion) > len(begin) and completion[: len(begin)] == begin:
            return completion[len(begin) :], flags[len(begin) :]
    return completion, flags


def _conversation(
    row: Mapping[str, Any], column: str, role: str, format: RowFormat
) -> tuple[Messages, Flags]:
    """Return the messages and flags of a side that may be a conversation as text, too."""
    value = row[column]
    if is_transcript(value):
        messages = read_transcript(value, f"column {column}")
        return messages, [None] * len(messages)
    if type(value) is str and has_turns(value):
        turns = turn_list(value, column)
        return read_turns(turns, f"column {column}, turn", format)
    return _one_side(row, column, role, format)


def _question(row: Mapping[str, Any], format: RowFormat) -> Messages:
    """Return the turns of a preference's prompt; none where there is no column for it."""
    column = prompt_of(row, format.columns)
    if column is None:
        return []
    messages, _ = _conversation(row, column, "user", format)
    context = text_of(row, "input", format) if column == "instruction" else None
    if context:
        return [{"role": "user", "content": f"{row[column]}\n{context}"}]
    return without_cue(messages) if is_transcript(row[column]) else messages


def _require_contained(prompt: Messages, chosen: Messages, column: str) -> None:
    """Reject a row whose chosen conversation lacks a turn of its prompt."""
    turns = {(message["role"], message["content"].strip()) for message in chosen}
    for message in prompt:
        if (message["role"], message["content"].strip()) not in turns:
            reject(
                "bad_message",
                f"column {column} is a whole conversation, which lacks what the prompt's column "
                f"says; to take {column} alone, name it: the column of messages is {column}",
            )


def _never_trained(prompt: Messages) -> Flags:
    """Return flags of a prompt's turns: whatever it says of them, its answers are not trained."""
    return [False if message["role"] == "assistant" else None for message in prompt]


def _calls(row: Mapping[str, Any], column: str, format: RowFormat) -> list[Any] | None:
    """Return the calls that a completion consists of; None: it is no list of calls.

    JSON in a column that is known to hold calls, and that does not, rejects the row.
    """
    value = row[column]
    if column.lower() == CALLS and type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            value = read_json(value, ROW_DECODER)
        except ValueError as error:
            _require_no_broken_calls(row, column, format, error)
            return None
        value = value if type(value) is list else [value]
        if not value or not all(map(_is_call, value)):
            reject("bad_message", f"column {column} is JSON, and no list of calls with a name")
    if type(value) is not list or not value:
        return None
    return value if all(map(_is_call, value)) else None


def _require_no_broken_calls(
    row: Mapping[str, Any], column: str, format: RowFormat, error: ValueError
) -> None:
    """Reject a row with tools whose answer looks like calls of them, and is not JSON."""
    has_tools = any(row.get(name) for name in possible_columns("tools", format.columns))
    if not has_tools or _CALLS_BEGIN.match(row[column]) is None:
        return
    cause, likely = "nested too deeply, or with half of a character", ""
    if isinstance(error, json.JSONDecodeError):
        cause = f"{error.msg} at character {error.pos} of {len(row[column])}"
        likely = likely_fault(error, row[column])
    reject(
        "bad_tool_call",
        f"column {column} looks like calls of the row's tools, and is not JSON: "
        f"{described(cause, likely)}",
    )


def _is_call(value: Any) -> bool:
    if type(value) is not dict or "role" in value or "from" in value:
        return False
    return type(value.get("name")) is str and "arguments" in value


def _add_reasoning(messages: Messages, row: Mapping[str, Any], format: RowFormat) -> None:
    """Put a row's column of reasoning before its last message, an answer without thoughts."""
    found = reasoning_of(row, format.columns)
    if found is None:
        return
    column, reasoning = found
    if type(reasoning) is not str:
        reject("bad_message", f"column {column} is {type_of(reasoning)}, not text")

    answer = messages[-1]
    has_own = _THOUGHTS_END in answer["content"] or "reasoning_content" in answer
    if answer["role"] == "assistant" and not has_own and reasoning.strip():
        messages[-1] = {**answer, "reasoning_content": reasoning}
