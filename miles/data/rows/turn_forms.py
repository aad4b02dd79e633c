"""Lists of turns as people write them -> turns that are objects with a role and a content.

["2+2?", "4"]                            a user's and an assistant's turn, and so on in turn
["User: 2+2?", "Assistant: 4"]           texts that all begin with a speaker
[["user", "2+2?"], ["ai", "4"]]          names of roles and what is said, as LangChain's messages
["user", "2+2?", "ai", "4"]              the same, in one list
[["2+2?", "4"], ["3+3?", "6"]]           the same, in pairs
[{"input": "2+2?", "output": "4"}]       a pair, under two names of `USUAL_PAIRS`
[{"Human": "2+2?", "Assistant": "4"}]    a pair, under names of roles
['{"role": "user", "content": "2+2?"}']  the JSON text of turns
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from miles.data.files.row_columns import USUAL_PAIRS
from miles.data.files.turn_values import ROLE_KEYS
from miles.data.rows.json_text import ROW_DECODER, read_json
from miles.data.rows.reject import reject, type_of
from miles.data.rows.roles import find_role

_SPEAKERS = ("user", "assistant")
_ORDER = ("system", *_SPEAKERS)
_PREFIX = re.compile(r"\s*([A-Za-z][\w-]{0,39}):\s*")
"""A speaker's possible name before what is said."""
_MARK = re.compile(r"\s*<\|(?:im_start\|>)?(?:system|user|assistant|human)\b", re.IGNORECASE)
"""A chat template's mark of a turn."""
_PLAIN_SPEAKERS = frozenset(("user", "human", "assistant", "gpt", "chatgpt", "ai", "bot"))
"""Names that, before a colon, are seldom the first word of a text."""


def as_objects(turns: Sequence[Any], what: str, named: Mapping[str, str]) -> Sequence[Any]:
    """Return turns as objects; those that are none of these forms stay as they are.

    Args:
        turns: one or more.
        what: the name of a turn in the detail of a reject.
        named: the roles that the user named.
    """
    first = turns[0]
    if type(first) is str:
        objects = _objects_of_json(turns)
        if objects is not None:
            return objects
        said = _said_by_role(turns[::2], turns[1::2], what, named)
        return _in_turn(turns, what, named) if said is None else said
    if type(first) is list:
        _require_pairs(turns, what)
        said = _said_by_role([pair[0] for pair in turns], [pair[1] for pair in turns], what, named)
        if said is not None:
            return said
        return _in_turn([text for pair in turns for text in pair], what, named)
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


def _said_by_role(
    names: Sequence[Any], contents: Sequence[Any], what: str, named: Mapping[str, str]
) -> list[dict[str, Any]] | None:
    """Return turns of names of roles and what they say; None where the names are no roles.

    A row where only some are roles is rejected: a role's name would be trained, or taken as said.
    """
    known = [find_role(name, named) is not None for name in names]
    if not any(known):
        return None
    if not all(known) or len(names) != len(contents):
        reject(
            "bad_message",
            f"{what}: of texts that may be roles and what they say, {sum(known)} of {len(names)} "
            "are names of roles; write objects with role and content, or name the others with "
            "--role-names",
        )
    said = zip(names, contents, strict=True)
    return [{"role": name, "content": content} for name, content in said]


def _in_turn(texts: Sequence[Any], what: str, named: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return texts as turns: by the speaker that each begins with, or the user's first."""
    for position, text in enumerate(texts):
        if type(text) is not str:
            reject("bad_message", f"{what} {position} is {type_of(text)}, and the first is text")

    prefixes = [_PREFIX.match(text) for text in texts]
    names = [None if prefix is None else prefix[1] for prefix in prefixes]
    if all(find_role(name, named) for name in names):
        return [
            {"role": prefix[1], "content": text[prefix.end() :]}
            for prefix, text in zip(prefixes, texts, strict=True)
            if prefix is not None
        ]
    for position, (name, text) in enumerate(zip(names, texts, strict=True)):
        if (name is not None and name.casefold() in _PLAIN_SPEAKERS) or _MARK.match(text):
            _reject_prefix(f"{what} {position}")

    if len(texts) > 1 and len(texts) % 2:  # one alone has nothing to train
        reject(
            "bad_message",
            f"{len(texts)} texts without roles, an odd count: a system text may be the first, or "
            "the last has no answer; write objects with role and content",
        )
    return [
        {"role": _SPEAKERS[position % 2], "content": text} for position, text in enumerate(texts)
    ]


def _reject_prefix(where: str) -> NoReturn:
    reject(
        "bad_message",
        f"{where} begins with a speaker's name or a template's mark, which would be trained; "
        "expected one before each text, as User:, or objects with role and content",
    )


def _require_pairs(pairs: Sequence[Any], what: str) -> None:
    for position, pair in enumerate(pairs):
        is_pair = type(pair) is list and len(pair) == 2 and type(pair[0]) is str
        if not is_pair or type(pair[1]) is dict:
            reject("bad_message", f"{what} {position} is not a pair of two texts")
