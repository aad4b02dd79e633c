"""Turns of ShareGPT (`from`, `value`), OpenAI (`role`, `content`) and others -> messages and flags.

    {"from": "gpt", "value": "4", "weight": 0}
    ->  {"role": "assistant", "content": "4"}, flag False

    {"role": "assistant", "content": "Let me see."}
    {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'}
    ->  {"role": "assistant", "content": "Let me see.", "tool_calls": [{…}]}, one turn as it is served

The forms are told apart turn by turn; lists of texts and of pairs become turns first
(`turn_forms.py`). A key of a turn whose value is null is as good as absent. A key that is not known
stays in the message, so that the template may read it, and so that it is counted if it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.config import RowFormat
from miles.data.files.media_columns import MEDIA
from miles.data.files.turn_values import CONTENT_KEYS, ROLE_KEYS
from miles.data.rows import content_parts
from miles.data.rows.json_text import MAX_DEPTH, read_json, require_shallow
from miles.data.rows.reject import reject, type_of
from miles.data.rows.roles import CALL, ROLES, find_role, reject_unknown_role
from miles.data.rows.tool_calls import function_calls, openai_calls
from miles.data.rows.train_flags import TRAIN_DETAIL, TRAIN_FLAGS, train_flag
from miles.data.rows.turn_forms import as_objects, first_key, pair_of_turns
from miles.data.types import EXTRA

_FUNCTION_CALL = "function_call"
_NOT_IN_MESSAGE = frozenset((*TRAIN_FLAGS, TRAIN_DETAIL, _FUNCTION_CALL))
_PLAIN_ROLES = frozenset(("system", "user", "assistant"))
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_OPEN = "<tool_response>"
CLOSE = "</tool_response>"

Messages = list[Mapping[str, Any]]
Flags = list[bool | None]


def read_turns(turns: Sequence[Any], what: str, format: RowFormat) -> tuple[Messages, Flags]:
    """Return messages and flags of turns. Most turns become one message each.

    Args:
        turns: objects, or another form of `turn_forms.py`.
        what: the name of a turn in the detail of a reject, such as "turn".
        format: has the roles that the user named.

    Returns:
        Messages with "role" and "content", and whether the row says that each is trained; None
        where it says nothing.
    """
    roles = {**ROLES, **format.roles} if format.roles else ROLES
    if turns and type(turns[0]) is not dict:
        turns = as_objects(turns, what, format.roles or {})

    messages: Messages = []
    flags: Flags = []
    for position, turn in enumerate(turns):
        if type(turn) is not dict:
            reject("bad_message", f"{what} {position} is {type_of(turn)}, not an object")

        name = turn.get("role")
        if name is None:
            name = turn.get("from")
        content = turn.get("content")
        if content is None:
            content = turn.get("value")

        role = roles.get(name) if type(name) is str else None
        is_plain = role in _PLAIN_ROLES or (role == "tool" and CLOSE not in str(content))
        if is_plain and len(turn) == 2 and type(content) is str:  # most turns
            messages.append({"role": role, "content": content})
            flags.append(None)
        else:
            _Turns(messages, flags, format.roles).add(turn, f"{what} {position}")
    return messages, flags


class _Turns:
    """The messages and flags of the turns so far, to which a turn of any form is added.

    Args:
        named: the roles that the user named.
    """

    def __init__(self, messages: Messages, flags: Flags, named: Mapping[str, str]) -> None:
        self._messages = messages
        self._flags = flags
        self._named = named

    def add(self, turn: Mapping[str, Any], where: str) -> None:
        """Add what a turn says.

        Args:
            where: its place in the row, for the detail of a reject.
        """
        require_shallow(turn, where, MAX_DEPTH + 1)
        turn = _with_extra(turn)
        role_key = first_key(turn, ROLE_KEYS)
        if role_key is None:
            pair = pair_of_turns(turn, self._named)
            if pair is not None:
                for part in pair:
                    self.add(part, where)
                return

        name = None if role_key is None else turn[role_key]
        role = find_role(name, self._named)
        if role is None:
            reject_unknown_role(name, where)

        content_key = first_key(turn, CONTENT_KEYS)
        content = None if content_key is None else turn[content_key]
        has_more = len(turn) > 2 or content_key is None
        keys = self._further_keys(turn, role, content, where) if has_more else {}
        if role == CALL:
            self._add_calls(content, keys, train_flag(turn, where), where)
        elif role == "assistant":
            keys = _with_function_call(keys, turn.get(_FUNCTION_CALL), where)
            self._add_message(_assistant_message(content, keys, where), train_flag(turn, where))
        else:
            _require_no_calls(role, keys, turn, where)
            for message in _messages_of(role, content, keys, where):
                self._add_message(message, None)

    def _add_message(self, message: Mapping[str, Any], flag: bool | None) -> None:
        self._messages.append(message)
        self._flags.append(flag)

    def _add_calls(
        self, content: Any, keys: Mapping[str, Any], flag: bool | None, where: str
    ) -> None:
        """Add a turn that is a call, to the assistant's turn before it where there is one."""
        calls = function_calls(content, where)
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._add_message(
                {"role": "assistant", "content": "", **keys, "tool_calls": calls}, flag
            )
            return

        if flag is not self._flags[-1]:
            reject("partial_turn", f"{where} is a call, flagged otherwise than the text before it")
        before = self._messages[-1]
        for key in _THOUGHTS:
            if key in keys and key in before:
                reject("bad_message", f"{where} is a call, and has {key} beside that of its text")
        calls = [*before.get("tool_calls", ()), *calls]
        self._messages[-1] = {**keys, **before, "tool_calls": calls}

    def _further_keys(
        self, turn: Mapping[str, Any], role: str, content: Any, where: str
    ) -> dict[str, Any]:
        """Return the keys of a turn, beside its role and content, that belong into the message."""
        keys = {}
        for key, value in turn.items():
            if value is None or key in _NOT_IN_MESSAGE:
                continue
            if key in ROLE_KEYS:
                is_said = find_role(value, self._named) == role  # by the role that was taken, too
            elif key in CONTENT_KEYS:
                is_said = value == content
            elif key in MEDIA:
                if value:
                    reject("has_image", f"{where} has {key}")
                is_said = True  # an empty list
            else:
                is_said = False
            if not is_said:
                keys[key] = value

        if "tool_calls" in keys:
            keys["tool_calls"] = openai_calls(keys["tool_calls"], where)
            if not keys["tool_calls"]:  # as good as absent
                del keys["tool_calls"]
        return keys


def _assistant_message(content: Any, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an assistant's message.

    Args:
        keys: of the message, beside role and content.
    """
    if not keys.keys().isdisjoint(_THOUGHTS):
        keys = _with_one_reasoning(keys, where)
    if content is None and "tool_calls" in keys:
        content = ""
    if content_parts.has_special_parts(content):
        special = content_parts.assistant_keys(content, where)
        if not special.keys().isdisjoint(keys):
            reject("bad_message", f"{where} has parts and keys that say the same")
        return {"role": "assistant", **special, **keys}
    text = content if type(content) is str else content_parts.text_of(content, where)
    return {"role": "assistant", "content": text, **keys}


def _with_one_reasoning(keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys of a message whose reasoning is one text, without values that say nothing.

    The template gets it under each of the names, so that of two texts one would be lost.
    """
    empty = [key for key in _THOUGHTS if key in keys and keys[key] in (False, [], {})]
    thoughts = {key: keys[key] for key in _THOUGHTS if key in keys and key not in empty}
    for key, thought in thoughts.items():
        if type(thought) is not str:
            reject("bad_message", f"{where}: {key} is {type_of(thought)}, not text")
    if len({thought.strip() for thought in thoughts.values()} - {""}) > 1:
        reject("bad_message", f"{where}: {' and '.join(thoughts)} hold different texts")
    return {key: value for key, value in keys.items() if key not in empty}


def _messages_of(
    role: str, content: Any, keys: Mapping[str, Any], where: str
) -> list[dict[str, Any]]:
    """Return the messages of a turn that is not the assistant's; further keys are the last one's."""
    if role == "user" and content_parts.has_special_parts(content):
        messages = content_parts.user_messages(content, where)
    else:
        text = content if type(content) is str else content_parts.text_of(content, where)
        texts = _without_wrappers(text) if role == "tool" else [text]
        messages = [{"role": role, "content": text} for text in texts]
    messages[-1] |= keys
    return messages


def _without_wrappers(text: str) -> list[str]:
    """Return the results that a tool's turn holds, each without <tool_response> around it.

    Templates that want these tags write them. Several results in one turn are several messages.
    """
    *wrapped, after = text.split(CLOSE)
    if not wrapped or after.strip():
        return [text]
    results = []
    for part in wrapped:
        before, opened, result = part.partition(_OPEN)
        if before.strip() or not opened:
            return [text]
        results.append(result.removeprefix("\n").removesuffix("\n"))
    return results


def _with_function_call(keys: dict[str, Any], call: Any, where: str) -> dict[str, Any]:
    """Return the keys of a message with its `function_call`, from before `tool_calls`."""
    if not _is_call(call):
        return keys
    if "tool_calls" in keys:
        reject("bad_tool_call", f"{where} has both {_FUNCTION_CALL} and tool_calls")
    return keys | {"tool_calls": function_calls(call, where)}


def _is_call(call: Any) -> bool:
    """Return whether the value of a `function_call` is not nothing: null, blank, an empty struct."""
    if type(call) is str:
        return bool(call.strip())
    if type(call) is dict:
        return any(value is not None for value in call.values())
    return call is not None


def _require_no_calls(
    role: str, keys: Mapping[str, Any], turn: Mapping[str, Any], where: str
) -> None:
    if "tool_calls" in keys or _is_call(turn.get(_FUNCTION_CALL)):
        reject("bad_tool_call", f"{where} has tool calls, and its role is {role}")


def _with_extra(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a turn with the keys that `EXTRA` holds; as it is where that is the row's text."""
    if type(turn.get(EXTRA)) is not str:
        return turn
    try:
        # A message's value was within it by some levels.
        extra = read_json(turn[EXTRA], max_depth=MAX_DEPTH + 10)
    except ValueError:
        return turn
    if type(extra) is not dict:
        return turn
    own = {key: value for key, value in turn.items() if key != EXTRA and value is not None}
    return extra | own
