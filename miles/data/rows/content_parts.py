"""The content of a turn as a list of parts: OpenAI's texts, and Anthropic's texts, thoughts, calls.

    of an assistant                     becomes
    {"type": "thinking", "thinking": …}   its reasoning_content
    {"type": "text", "text": …}           its content; several are joined
    {"type": "tool_use", "input": …}      one of its tool_calls

    of a user
    {"type": "tool_result", "content": …} a message of the role tool
    {"type": "text", "text": …}           the user's message

Templates write reasoning, then text, then calls. Parts of a turn in another order would be moved,
so such a row is dropped, and so is one with an image, sound or film. Gemini's part with `"thought":
true` is thinking, too. A flag that leaves out a part of a turn drops the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.data.rows.media import is_media_part
from miles.data.rows.reject import reject, type_of
from miles.data.rows.tool_calls import new_call, with_arguments
from miles.data.rows.train_flags import TRAIN_FLAGS, train_flag

_TEXT_TYPES = ("text", "input_text", "output_text", None)
_ORDER = ("thinking", "text", "tool_use")
_PLAIN_KEYS = frozenset(("type", "text"))
_SAYS_MORE = ("thinking", "reasoning_content", "reasoning", "functionCall", "tool_calls")
"""Keys that would be lost in a part that is text."""


def text_of(parts: Any, where: str) -> str:
    """Return content that is a list of parts, all of them text, as one text."""
    if type(parts) is not list:
        reject("bad_message", f"{where}: content is {type_of(parts)}, not text")
    return "".join(_text(part, number, where) for number, part in enumerate(parts))


def has_special_parts(content: Any) -> bool:
    """Return whether a content has parts of Anthropic's that are no text."""
    return type(content) is list and any(_kind(part) != "text" for part in content)


def assistant_keys(parts: Sequence[Any], where: str) -> dict[str, Any]:
    """Return the keys of an assistant's message that has Anthropic's parts."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []

    last = 0
    for number, part in enumerate(parts):
        kind = _kind(part)
        if kind == "tool_result" or _ORDER.index(kind) < last:
            reject("bad_message", f"{where}: part {number} of the content is not in its order")
        last = _ORDER.index(kind)

        if kind != "text":
            _require_whole(part, f"{where}: part {number}")
        if kind == "thinking":
            key = "text" if part.get("thinking") is None else "thinking"
            thoughts.append(_string(part.get(key), number, where))
        elif kind == "tool_use":
            calls.append(_call(part, f"{where}: part {number}"))
        else:
            texts.append(_text(part, number, where))

    keys: dict[str, Any] = {"content": "".join(texts)}
    if thoughts:
        keys["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        keys["tool_calls"] = calls
    return keys


def user_messages(parts: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Return the messages of a user's turn that has Anthropic's parts, in their order."""
    messages: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        if _kind(part) == "tool_result":
            messages.append(_result(part, f"{where}: part {number}"))
            continue
        text = _text(part, number, where)
        if messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += text
        else:
            messages.append({"role": "user", "content": text})
    return messages


def _kind(part: Any) -> str:
    """Return which of Anthropic's kinds a part is; text where it is none."""
    if type(part) is not dict:
        return "text"
    kind = "thinking" if part.get("thought") is True else part.get("type")
    return kind if kind in ("thinking", "tool_use", "tool_result") else "text"


def _text(part: Any, number: int, where: str) -> str:
    """Return the text of a part that must be text."""
    if is_media_part(part):
        reject("has_image", f"{where}: part {number} of the content is an image, sound or film")
    is_text_part = type(part) is dict and part.get("type") in _TEXT_TYPES
    if is_text_part and not part.keys() <= _PLAIN_KEYS:
        _require_only_text(part, f"{where}: part {number} of the content")
    return _string(part.get("text") if is_text_part else part, number, where)


def _require_only_text(part: Mapping[str, Any], where: str) -> None:
    """Reject a row with a part of text that says something else, or is not trained."""
    if part.get("thought") is True:
        reject("bad_message", f"{where} is a thought, and the turn is not the assistant's")
    for key in _SAYS_MORE:
        if part.get(key):
            reject("bad_message", f"{where} has {key} beside its text; write a part for each")
    _require_whole(part, where)


def _require_whole(part: Mapping[str, Any], where: str) -> None:
    if not part.keys().isdisjoint(TRAIN_FLAGS) and train_flag(part, where) is False:
        reject("partial_turn", f"{where} is flagged as not trained; only whole turns can be")


def _string(text: Any, number: int, where: str) -> str:
    if type(text) is not str:
        reject("bad_message", f"{where}: part {number} of the content is not text")
    return text


def _call(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a `tool_use` part as an OpenAI tool call."""
    name = part.get("name")
    if type(name) is not str:
        reject("bad_message", f"{where} is a call without a name")
    arguments = with_arguments({**part}, where)["arguments"]
    return new_call({"name": name, "arguments": arguments}, part.get("id"))


def _result(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a `tool_result` part as a message."""
    content = part.get("content")
    if content is None:
        content = ""
    text = content if type(content) is str else text_of(content, where)

    message = {"role": "tool", "content": text}
    if part.get("tool_use_id") is not None:
        message["tool_call_id"] = part["tool_use_id"]
    if part.get("is_error"):
        message["is_error"] = part["is_error"]
    return message
