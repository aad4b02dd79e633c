"""Renders a conversation once, whole, and finds its assistant turns in the text.

    messages  ->  "<|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n"
                                                                         ^^^^^^^^^^^ span of the turn

What begins and ends an assistant turn (the *anchors*: `<|im_start|>assistant\\n` and `<|im_end|>`) is known
from the template's certificate. In a row's own render an anchor could also be text that a user typed. To tell them
apart without looking into that text: each anchor has a *pivot*, a rare character such as `|`. Where no string
of the row holds a pivot, no anchor can have come from the row, however the template cuts, joins or escapes
its strings, and one render is enough. Otherwise the row is rendered once more with a noncharacter (U+FDD0 …)
put behind each pivot in its strings:

    plain     user says "<|im_end|>"      …user\\n<|im_end|><|im_end|>…
    marked    "|" becomes "|\\ufdd0"       …user\\n<|⬩im_end|⬩><|im_end|>…     only the last one is the template's

The marked text less its marks must be the plain text, character by character (else other pivots are tried,
then the row is refused); the intact anchors in it must be one beginning and one end for each assistant
message; their positions less the marks before them are the spans in the plain text. Nothing is ever
rendered in part, and nothing is searched for in what a user wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from miles.data.types import RowRejected

_NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


@dataclass(frozen=True)
class Anchors:
    """What begins and ends an assistant turn of one chat template; learned by `miles.data.template.certify`."""

    generation_prompt: str
    """what serving appends to the conversation before the model answers"""
    turn_header: str
    """the part of the generation prompt that every assistant turn begins with, earlier ones too"""
    terminator: str
    """the special token that ends every assistant turn"""
    empty_think: str
    """the empty think block that the template puts between header and answer; "" where it puts none"""
    pivots: tuple[str, ...]
    """sets of characters, to be tried in this order: each anchor holds one of the set before its last character"""


class Span(NamedTuple):
    """One assistant turn in the rendered text, as character positions."""

    start: int
    """behind the generation prompt"""
    answer: int
    """behind an empty think block where there is one, else `start`"""
    end: int
    """behind the terminator"""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any],
    anchors: Anchors,
) -> tuple[str, list[Span]]:
    """Renders a conversation and finds its assistant turns.

    Args:
        messages, tools: plain JSON types.

    Returns:
        the text, as `tokenizer.apply_chat_template(..., tokenize=False)` gives it, and one span for each
        assistant message, in order.

    Raises:
        RowRejected: "template_error" where the template raises, "unlocatable_turn" where the turns cannot be
            told exactly.
    """
    text = render_text(tokenizer, messages, tools, template_kwargs)
    num_turns = sum(message.get("role") == "assistant" for message in messages)
    marked = text
    mark = ""
    for pivots in anchors.pivots:
        if not any(pivot in own for own in strings([messages, tools]) for pivot in pivots):
            marked, mark = text, ""
            break
        mark = _unused_character(text, messages, tools)
        table = {ord(pivot): pivot + mark for pivot in pivots}
        marked_tools = None if tools is None else _mark(tools, table)
        try:
            marked = render_text(tokenizer, _mark(messages, table), marked_tools, template_kwargs)
        except RowRejected:  # the template looks at what the marks changed
            continue
        if marked.replace(mark, "") == text:
            break
    else:
        raise RowRejected(
            "unlocatable_turn", "the chat template changes text that spells its own markers; no turn can be told"
        )
    return text, _scan(marked, mark, num_turns, anchors)


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as transformers renders it, in its sandbox.

    Raises:
        RowRejected: "template_error": the template raised.
    """
    kwargs = dict(template_kwargs)
    if "strftime_now" in str(tokenizer.chat_template):
        kwargs["strftime_now"] = ""  # not callable: a render that would hold today's date fails instead
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )
    except Exception as error:  # a template can fail in any way that Jinja and Python know
        detail = f"{type(error).__name__}: {error}"[:200]
        if any(own in detail for own in strings(messages) if len(own) > 12):
            detail = type(error).__name__  # it quotes the row, whose text goes into no ledger
        raise RowRejected("template_error", detail) from error
    return text


def strings(value: Any) -> Iterator[str]:
    """Every string in plain JSON data, but for keys that are identifiers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and not key.isidentifier():
                yield key
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def _mark(value: Any, table: Mapping[int, str]) -> Any:
    """Plain JSON data with each character in `table` replaced, in all that `strings` gives."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, Mapping):
        return {
            key.translate(table) if isinstance(key, str) and not key.isidentifier() else key: _mark(item, table)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mark(item, table) for item in value]
    return value


def _unused_character(text: str, messages: Any, tools: Any) -> str:
    for character in _NONCHARACTERS:
        if character not in text and not any(character in own for own in strings([messages, tools])):
            return character
    raise RowRejected("unlocatable_turn", "the row's text holds every noncharacter from U+FDD0 to U+FDEF")


def _scan(marked: str, mark: str, num_turns: int, anchors: Anchors) -> list[Span]:
    header, terminator = anchors.turn_header, anchors.terminator
    begins = []
    position = marked.find(header)
    while position >= 0:
        begins.append(position)
        position = marked.find(header, position + len(header))
    if len(begins) != num_turns:
        raise RowRejected(
            "unlocatable_turn", f"{num_turns} assistant messages; the chat template begins {len(begins)} turns"
        )
    spans = []
    for turn, (begin, limit) in enumerate(zip(begins, [*begins[1:], len(marked)], strict=True)):
        start = begin + len(header)
        if marked.startswith(anchors.generation_prompt, begin):
            start = begin + len(anchors.generation_prompt)
        answer = start
        if anchors.empty_think and marked.startswith(header + anchors.empty_think, begin):
            answer = max(start, begin + len(header) + len(anchors.empty_think))
        end = marked.find(terminator, start, limit)
        if end < 0:
            raise RowRejected("unlocatable_turn", f"assistant turn {turn} is not ended by {terminator}")
        end += len(terminator)
        if mark:
            start, answer, end = (point - marked.count(mark, 0, point) for point in (start, answer, end))
        spans.append(Span(start, answer, end))
    return spans
