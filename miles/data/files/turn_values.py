"""Values that hold the turns of a conversation, told by what is in them.

    [{"role": "user", …}, …]  [{"from": "human", …}, …]      objects
    ["2+2?", "4"]  [["2+2?", "4"]]                           texts and pairs
    {"from": ["human", "gpt"], "value": ["2+2?", "4"]}       a struct of lists
    {"turn_1": {"Human": …, "MOSS": …}}                      an object of turns
    "\\n\\nHuman: 2+2?\\n\\nAssistant: 4"                    a transcript

A column's name may be anything; these are strong signs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

ROLE_KEYS = ("role", "from", "speaker")
"""Keys of a turn that name its speaker."""
CONTENT_KEYS = ("content", "value", "text", "parts")
"""Keys of a turn that hold what is said."""
TREE_KEYS = (
    *("message_tree_id", "conversation_id", "thread_id", "parent_id", "parent_message_id"),
    *("parent", "message_id"),
)
"""Columns that say to which conversation, or to which message, a message belongs."""
NUMBERED_TURN = re.compile(r"turn_([0-9]{1,6})")
"""Key of a turn in an object of turns."""

_PAIR_KEYS = (("input", "output"), ("user", "assistant"), ("human", "assistant"))
_TRANSCRIPT = re.compile(r"\s*(?:\n\nHuman:|Human:|USER:|### Human:)")
_MOST_PARSED = 1 << 20


def has_turns(value: Any) -> bool:
    """Return whether a value looks like the turns of a conversation."""
    if type(value) is str:
        return _is_json_of_turns(value)
    if type(value) is list:
        return _is_list_of_turns(value)
    return type(value) is dict and (is_struct_of_lists(value) or is_object_of_turns(value))


def is_turn(value: Any) -> bool:
    """Return whether a value is one message: an object with a speaker and what is said."""
    if type(value) is not dict:
        return False
    has_role = any(type(value.get(key)) is str for key in ROLE_KEYS)
    return has_role and any(key in value for key in (*CONTENT_KEYS, "tool_calls"))


def is_struct_of_lists(value: Mapping[str, Any]) -> bool:
    """Return whether an object holds the turns column by column, as `Sequence` of Hugging Face."""
    lists = [item for item in value.values() if item is not None]
    if not lists or any(type(item) is not list for item in lists):
        return False
    return any(type(value.get(key)) is list and value[key] for key in ROLE_KEYS)


def is_object_of_turns(value: Mapping[str, Any]) -> bool:
    """Return whether an object has keys turn_1, turn_2, …, as MOSS's conversations have."""
    return bool(value) and all(map(NUMBERED_TURN.fullmatch, value))


def is_transcript(value: Any) -> bool:
    """Return whether a text begins with the name of a speaker that asks: `Human:`, `USER:`."""
    return type(value) is str and _TRANSCRIPT.match(value) is not None


def _is_list_of_turns(value: list[Any]) -> bool:
    if not value:
        return False
    first = value[0]
    if type(first) is str:
        return len(value) > 1 and all(type(item) is str for item in value)
    if type(first) is list:
        return len(first) == 2 and all(type(item) is str for item in first)
    return is_turn(first) or _is_pair(first)


def _is_pair(value: Any) -> bool:
    if type(value) is not dict:
        return False
    keys = {key.lower() for key in value}
    return any(keys.issuperset(pair) for pair in _PAIR_KEYS)


def _is_json_of_turns(text: str) -> bool:
    if not text.lstrip().startswith("[") or len(text) > _MOST_PARSED:
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return type(value) is list and _is_list_of_turns(value)
