"""Lists of turns as people write them -> turns that are objects with a role and a content.

["2+2?", "4"]                            a user's and an assistant's turn, and so on in turn
[["2+2?", "4"], ["3+3?", "6"]]           the same, in pairs
[{"input": "2+2?", "output": "4"}]       a pair, under two names of `USUAL_PAIRS`
[{"Human": "2+2?", "Assistant": "4"}]    a pair, under names of roles
['{"role": "user", "content": "2+2?"}']  the JSON text of turns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.files.row_columns import USUAL_PAIRS
from miles.data.files.turn_values import ROLE_KEYS
from miles.data.rows.json_text import ROW_DECODER, read_json
from miles.data.rows.reject import reject, type_of
from miles.data.rows.roles import find_role

_SPEAKERS = ("user", "assistant")
_ORDER = ("system", *_SPEAKERS)


def as_objects(turns: Sequence[Any], what: str) -> Sequence[Any]:
    """Return turns as objects; those that are none of these forms stay as they are.

    Args:
        turns: one or more.
        what: the name of a turn in the detail of a reject.
    """
    first = turns[0]
    if type(first) is str:
        return _objects_of_json(turns) or _in_turn(turns, what)
    if type(first) is list:
        return _in_turn(_flat_pairs(turns, what), what)
    return turns


def first_key(turn: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return the first of some keys whose value is not null; None if there is none."""
    for key in keys:
        if turn.get(key) is not None:
            return key
    return None


def pair_of_turns(turn: Mapping[str, Any], named: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """Return the turns of an object without a role that holds an exchange.

    What else is in it belongs to the assistant's turn.

    Args:
        named: the roles that the user named.

    Returns:
        None: it holds none.
    """
    for question, answer in USUAL_PAIRS:
        if turn.get(question) is not None and answer in turn:
            return _exchange(turn, {"user": question, "assistant": answer})

    keys: dict[str, str] = {}
    for key in turn:
        role = find_role(key, named)
        if role in _ORDER and role not in keys:
            keys[role] = key
    if not keys.keys() >= set(_SPEAKERS):
        return None
    return _exchange(turn, keys)


def _exchange(turn: Mapping[str, Any], keys: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one turn for each role, in their order.

    Args:
        keys: role -> the key of its content.
    """
    turns: list[dict[str, Any]] = []
    for role in _ORDER:
        if role in keys and (role in _SPEAKERS or turn[keys[role]] is not None):
            turns.append({"role": role, "content": turn[keys[role]]})
    used = keys.values()
    further = {key: value for key, value in turn.items() if key not in used}
    turns[-1] = further | turns[-1]
    return turns


def _objects_of_json(texts: Sequence[Any]) -> list[Any] | None:
    """Return the turns that texts are the JSON of; None where a text is no such JSON."""
    turns = []
    for text in texts:
        if type(text) is not str or not text.lstrip().startswith("{"):
            return None
        try:
            turn = read_json(text, ROW_DECODER)
        except ValueError:
            return None
        if type(turn) is not dict or first_key(turn, ROLE_KEYS) is None:
            return None
        turns.append(turn)
    return turns


def _in_turn(texts: Sequence[Any], what: str) -> list[dict[str, Any]]:
    """Return texts as turns: the user's first, then the assistant's."""
    turns = []
    for position, text in enumerate(texts):
        if type(text) is not str:
            reject("bad_message", f"{what} {position} is {type_of(text)}, and the first is text")
        turns.append({"role": _SPEAKERS[position % 2], "content": text})
    return turns


def _flat_pairs(pairs: Sequence[Any], what: str) -> list[Any]:
    texts: list[Any] = []
    for position, pair in enumerate(pairs):
        if type(pair) is not list or len(pair) != 2 or not all(type(text) is str for text in pair):
            reject("bad_message", f"{what} {position} is not a pair of two texts")
        texts += pair
    return texts
