"""Rejects rows with a trained answer that says nothing.

    ""  "\\u200b"  "<think>\\n\\n</think>"  "<|endoftext|>"     nothing: `empty_answer`
    "0"  "<think>Add.</think>"  a tool call               something: thoughts are said, too
    [{"type": "text", "text": "4"}]                       something, of which a template that knows
                                                          no parts writes nothing: `template_error`

The first two are told by the messages, the last by the text that was rendered of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.data.encoding.plain_text import end_tokens
from miles.data.template.render import Span
from miles.data.types import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_KEYS = ("content", "reasoning_content", "thinking", "reasoning")
_NOT_FURTHER = frozenset(("role", "tool_calls", *_ANSWER_KEYS))
_SHOWN_KEYS = 3
_MAX_KEY = 40

_SILENT = (
    r"\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u2028-\u202f\u205f-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb"
    r"\U000e0000-\U000e0fff"
)
"""White space, control characters, and those that Unicode has nothing shown for."""
_FILLERS = "\u115f\u1160\u3164\uffa0"
"""Those of them that Python takes for letters."""
_SAYS = re.compile(f"[^{_SILENT}]")
_EMPTY_THINK = re.compile(f"(<think>)?[{_SILENT}]*</think>")


def silent_tokens(
    tokenizer: PreTrainedTokenizerBase, url: str, terminator_ids: Sequence[int], terminator: str
) -> tuple[str, ...]:
    """Return the tokens that say nothing: those that begin, end or pad a text.

    Special tokens that a user added are none of them: they may be an answer.
    """
    named = [text for text in tokenizer.special_tokens_map.values() if isinstance(text, str)]
    ends = end_tokens(tokenizer, url, terminator_ids).values()
    return tuple(dict.fromkeys(text for text in (terminator, *ends, *named) if text))


def require_answers(
    messages: Sequence[Mapping[str, Any]], selected: Sequence[bool], silent: tuple[str, ...]
) -> None:
    """Require that every answer that is trained says something: text, reasoning or a tool call.

    Args:
        selected: as `select_turns` returns it.
        silent: as `silent_tokens` returns them, where content may spell a token; else none.

    Raises:
        RowRejected: "empty_answer"
    """
    turn = -1
    for message in messages:
        if message.get("role") != "assistant":
            continue
        turn += 1
        content = message.get("content")
        if type(content) is str and begins_word(content[:1]):
            continue  # most answers
        if selected[turn] and _says_nothing(message, silent):
            raise RowRejected(
                "empty_answer", f"assistant turn {turn} says nothing{_further(message)}"
            )


def require_written(
    text: str,
    spans: Sequence[Span],
    messages: Sequence[Mapping[str, Any]],
    selected: Sequence[bool],
    terminator: str,
) -> None:
    """Require that of every trained answer that says something, something was rendered.

    Args:
        text, spans: as `Renderer.render` returns them.

    Raises:
        RowRejected: "template_error"
    """
    for turn, (_, answer, end) in enumerate(spans):
        if text[answer].isalnum():  # most answers
            continue
        if not selected[turn] or not shows_nothing(text, answer, end - len(terminator)):
            continue
        answers = [message for message in messages if message.get("role") == "assistant"]
        if not _says_nothing(answers[turn], (terminator,)):
            raise RowRejected(
                "template_error", f"the chat template writes nothing of assistant turn {turn}"
            )


def begins_word(first: str) -> bool:
    """Return whether an answer with this first character surely says something."""
    return first.isalnum() and first not in _FILLERS


def shows_nothing(text: str, begin: int, end: int) -> bool:
    """Return whether there is nothing to see in a stretch of a text."""
    return not _SAYS.search(text, begin, end)


def _says_nothing(message: Mapping[str, Any], silent: tuple[str, ...]) -> bool:
    if message.get("tool_calls"):
        return False
    texts = (message.get(key) for key in _ANSWER_KEYS)
    return all(text is None or is_blank(text, silent) for text in texts)


def is_blank(text: Any, silent: tuple[str, ...]) -> bool:
    """Return whether a text, or a list of parts with a text each, says nothing."""
    if isinstance(text, list):
        return all(
            isinstance(part, Mapping) and is_blank(part.get("text"), silent) for part in text
        )
    if not isinstance(text, str):
        return False
    first = _SAYS.search(text)
    if first is None:
        return True
    if not text.startswith(("<think>", "</think>", *silent), first.start()):  # most answers
        return False
    for token in silent:
        text = text.replace(token, "")
    return not _SAYS.search(_EMPTY_THINK.sub("", text))


def _further(message: Mapping[str, Any]) -> str:
    """Name the other keys of a message, in which its answer may stand."""
    keys = [key for key, value in message.items() if key not in _NOT_FURTHER and value]
    if not keys:
        return ""
    shown = [_cut(key) for key in keys[:_SHOWN_KEYS]]
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f"; it has further keys: {', '.join(shown)}{more}"


def _cut(key: str) -> str:
    return key if len(key) <= _MAX_KEY else key[:_MAX_KEY] + "…"
