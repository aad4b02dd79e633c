"""Renders a conversation once, whole, and finds its assistant turns in the text.

    messages  ->  "<|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n"
                                                                         ^^^^^^^^^^^ span of the turn

What begins and ends an assistant turn (the *anchors*: `<|im_start|>assistant\\n` and `<|im_end|>`) is known from the
template's certificate. They are looked for in the template's own text only, which `template.trace` tells from
what the row says: a user who types `<|im_end|>` moves nothing. There must be one beginning and one end for each
assistant message, or the row is refused. Nothing is ever rendered in part.

A program that was just made is compared with transformers' own render of the same row, character by character; the
rows that take it later have the same shape and gave the same answers.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from miles.data.template.anchors import Anchors
from miles.data.template.symbols import Unbounded, Untraceable
from miles.data.template.trace import Program, Tracer
from miles.data.types import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_CHARACTERS = string.ascii_letters + string.digits + "_ "
"""What keys of any row are made of; no anchor is made of these alone."""


class Span(NamedTuple):
    """One assistant turn in the rendered text, as character positions."""

    start: int
    """behind the generation prompt"""
    answer: int
    """behind an empty think block where there is one, else `start`"""
    end: int
    """behind the terminator"""


class _Turn(NamedTuple):
    """Where in a program's parts a turn lies: part and character in it."""

    begin: tuple[int, int]
    """of the header"""
    end: tuple[int, int]
    """behind the terminator"""


class Renderer:
    """A chat template with what it is given, and where its assistant turns are.

    Raises:
        Untraceable: the template does not compile.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any],
        anchors: Anchors,
    ) -> None:
        self._tokenizer, self._kwargs, self._anchors = tokenizer, template_kwargs, anchors
        reserved = "".join(set(anchors.turn_header + anchors.terminator) - set(_WORD_CHARACTERS))
        self._tracer = Tracer(
            str(tokenizer.chat_template),
            {**tokenizer.special_tokens_map, **template_kwargs},
            reserved,
        )

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
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
        try:
            program, strings = self._tracer.program(messages, tools)
            pieces = program.run(strings)
        except Unbounded as error:  # transformers has no bounds: it does not get to run this
            detail = f"the chat template does not end, or would make anything large: {error}"
            raise RowRejected("template_error", detail) from error
        except Untraceable as error:
            render_text(
                self._tokenizer, messages, tools, self._kwargs
            )  # raises where the template does
            raise RowRejected(
                "unlocatable_turn", f"the chat template cannot be followed: it takes {error}"
            ) from error
        text = "".join(pieces)
        if program.note is None:
            program.note = self._check(program, messages, tools, text)
        if isinstance(program.note, RowRejected):
            raise RowRejected(program.note.reason, program.note.detail)
        return text, self._spans(program.note, pieces, text)

    def _check(
        self,
        program: Program,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
    ) -> list[_Turn] | RowRejected:
        """A new program's turns, or why rows that take it are rejected."""
        try:
            rendered = render_text(self._tokenizer, messages, tools, self._kwargs)
        except RowRejected as rejected:
            return rejected
        if text != rendered:
            return RowRejected(
                "unlocatable_turn",
                "the chat template could not be followed: transformers renders another text",
            )
        answering = [
            number for number, message in enumerate(messages) if message.get("role") == "assistant"
        ]
        turns = _locate(program, answering, self._anchors.turn_header, self._anchors.terminator)
        return RowRejected("unlocatable_turn", turns) if isinstance(turns, str) else turns

    def _spans(self, turns: Sequence[_Turn], pieces: Sequence[str], text: str) -> list[Span]:
        anchors = self._anchors
        starts = list(accumulate(map(len, pieces), initial=0))
        spans = []
        for turn in turns:
            begin = starts[turn.begin[0]] + turn.begin[1]
            header_end = begin + len(anchors.turn_header)
            start = header_end
            if text.startswith(anchors.generation_prompt, begin):
                start = begin + len(anchors.generation_prompt)
            answer = start
            for think in anchors.empty_thinks:
                if text.startswith(think, header_end):
                    answer = max(start, header_end + len(think))
                    break
            spans.append(Span(start, answer, starts[turn.end[0]] + turn.end[1]))
        return spans


def _locate(
    program: Program, answering: Sequence[int], header: str, terminator: str
) -> list[_Turn] | str:
    """One turn for each assistant message (`answering`, by number), or why there is not.

    A turn goes from a header to the next terminator, over further headers (reasoning in a block of its own), and
    holds nothing that another message says.
    """
    begins, ends = _find(program, header), _find(program, terminator)
    turns: list[_Turn] = []
    for begin in begins:
        if turns and begin < turns[-1].end:
            continue
        behind = (begin[0], begin[1] + len(header))
        end = next((place for place in ends if place >= behind), None)
        if end is None:
            return f"assistant turn {len(turns)} is not ended by {terminator}"
        turns.append(_Turn(begin, (end[0], end[1] + len(terminator))))
    if len(turns) != len(answering):
        return f"{len(answering)} assistant messages; the chat template begins {len(turns)} turns"
    for number, (message, turn) in enumerate(zip(answering, turns, strict=True)):
        if not all(owners <= {message} for owners in program.owners[turn.begin[0] : turn.end[0]]):
            return f"assistant turn {number} would hold what another message says"
    return turns


def _find(program: Program, anchor: str) -> list[tuple[int, int]]:
    """Where an anchor is in the template's own text: part and character in it."""
    places = []
    for number, part in enumerate(program.parts):
        position = part.find(anchor) if isinstance(part, str) else -1
        while position >= 0:
            places.append((number, position))
            position = part.find(anchor, position + len(anchor))  # type: ignore[union-attr]
    return places


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
        kwargs["strftime_now"] = (
            ""  # not callable: a render that would hold today's date fails instead
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )
    except Exception as error:  # a template can fail in any way that Jinja and Python know
        detail = type(error).__name__
        if _quotes_template(error, str(tokenizer.chat_template)):
            detail = f"{detail}: {error}"[:200]
        raise RowRejected("template_error", detail) from error
    return text


def _quotes_template(error: Exception, template: str) -> bool:
    """Whether an error's words are the template's own: any others may be the row's, whose text goes into no ledger."""
    quoted = (
        re.findall("'(.*?)'", str(error))
        if isinstance(error, jinja2.UndefinedError)
        else [str(error)]
    )
    return all(words.endswith(" object") or words in template for words in quoted)


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
