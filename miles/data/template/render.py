"""Renders a conversation, once and as a whole, and finds the spans of its assistant turns.

    messages  ->  <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n
                                                                         ^^^^^^^^^^^ a span

The anchors, which begin and end an assistant turn, are known from the certificate. Three phases:

    program    the template's program for the row (`trace.py`); it computes the text, part by part
    turns      once for each program: the anchors are looked for in its literal parts only, and
               paired into one turn for each assistant message
    spans      for each row: where those turns lie in this row's text

Invariants:

- An anchor that a user types moves nothing: no text of a row is in a literal part.
- There is exactly one turn for each assistant message, and it holds no other message's words.
  Otherwise the rows of that program are refused; no turn is guessed.
- A new program is compared, character by character, with what transformers renders for its first
  row. Later rows of the program have the same shape and gave the same answers.
"""

from __future__ import annotations

import re
import string
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from miles.data.template.anchors import Anchors
from miles.data.template.rehearsal import require_ends
from miles.data.template.symbols import MAX_CHARACTERS, Strings, Unbounded, Untraceable
from miles.data.template.trace import (
    MarkerKey,
    Message,
    MessageKey,
    Program,
    Shape,
    Tool,
    Tracer,
)
from miles.data.template.turn_places import Place, Spans, Turn, TurnPlaces
from miles.data.types import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_CHARACTERS = string.ascii_letters + string.digits + "_ "
"""Roles and keys may hold these; no anchor is made of these alone."""

_MAX_DETAIL_CHARACTERS = 200
_FEW_ROWS = 4
"""Fewer rows of a program are rendered quicker one by one."""


class Span(NamedTuple):
    """One assistant turn in the rendered text, in characters."""

    start: int
    """after the generation prompt"""
    answer: int
    """after an empty think block if there is one, else `start`"""
    end: int
    """after the terminator"""


class RowVariables(NamedTuple):
    """The variables that a row brings, and what they make of the template."""

    variables: dict[str, Any]
    anchors: Anchors
    """under these variables; the run's own for a row without"""


class RenderedRows(NamedTuple):
    """Rows of one program."""

    numbers: list[int]
    """[rows]: which of the rows that were given"""
    texts: list[str]
    spans: Spans
    opening: str
    """text of the template's own with which each of the texts begins"""


class Renderer:
    """Renders conversations by one chat template, and finds their assistant turns.

    Raises:
        Untraceable: the template does not compile.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any],
        anchors: Anchors,
    ) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs)
        self._anchors = anchors
        self._of_run = RowVariables({}, anchors)
        reserved = set(anchors.turn_header + anchors.terminator) - set(_WORD_CHARACTERS)
        self._tracer = Tracer(
            str(tokenizer.chat_template),
            {**tokenizer.special_tokens_map, **template_kwargs},
            "".join(reserved),
        )

    @property
    def variable_names(self) -> frozenset[str]:
        """The variables that the template reads."""
        return self._tracer.names

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        of_row: RowVariables | None = None,
    ) -> tuple[str, list[Span]]:
        """Render a conversation and find its assistant turns.

        Args:
            messages, tools: plain JSON types.
            of_row: the row's own variables, and the anchors under them. They have this renderer's
                terminator, and a turn header that begins with this renderer's.

        Returns:
            The text, as `tokenizer.apply_chat_template(..., tokenize=False)` gives it, and one span
            for each assistant message, in order.

        Raises:
            RowRejected: "template_error" where the template raises or does not end;
                "unlocatable_turn" where it cannot be followed, or a turn cannot be located.
        """
        of_row = of_row or self._of_run
        try:
            program, strings = self._tracer.program(messages, tools, of_row.variables)
            pieces = program.run(strings)
        except Unbounded as error:  # transformers sets no bounds, so it must not run this
            raise _endless(error) from error
        except MarkerKey as error:
            raise RowRejected("unlocatable_turn", str(error)) from error
        except Untraceable as error:
            # Raises "template_error" if the template itself fails on this row.
            render_text(self._tokenizer, messages, tools, self._kwargs | of_row.variables)
            raise RowRejected(
                "unlocatable_turn", f"the chat template cannot be followed: it takes {error}"
            ) from error

        text = "".join(pieces)
        if program.note is None:
            kwargs = self._kwargs | of_row.variables
            program.note = self._locate_turns(program, messages, tools, kwargs, text)
        if isinstance(program.note, RowRejected):
            raise RowRejected(program.note.reason, program.note.detail)
        return text, _find_spans(of_row.anchors, program.note.turns, pieces, text)

    def render_known(self, shape: Shape, rows: Sequence[Strings]) -> list[RenderedRows]:
        """Render rows of one shape without variables, as far as their programs are known.

        A row that is in none of the results has to be rendered by itself: its program is new, is
        refused, or has few rows.

        Args:
            shape: as `trace.shape_of` returns it.
            rows: the strings of each row.
        """
        rendered = []
        try:
            taken = self._tracer.walk(shape, rows)
        except Untraceable:
            return []
        for program, numbers in taken:
            if program is None or not isinstance(program.note, TurnPlaces):
                continue
            if len(numbers) < _FEW_ROWS or not program.note.computes:
                continue
            is_all = len(numbers) == len(rows)
            strings = rows if is_all else [rows[number] for number in numbers]
            if group := _render_rows(program, program.note, numbers, strings):
                rendered.append(group)
        return rendered

    def unread_keys(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any],
    ) -> tuple[MessageKey, ...]:
        """Return the keys of the messages at which the template does not look.

        They are empty for a row that it does not render.
        """
        try:
            program, _ = self._tracer.program(messages, tools, variables)
        except Untraceable:
            return ()
        return program.unread

    def _locate_turns(
        self,
        program: Program,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        kwargs: Mapping[str, Any],
        text: str,
    ) -> TurnPlaces | RowRejected:
        """Return the turns of a new program, or the reason to reject all rows that take it."""
        try:
            # Its trace has ended within the limits: no rehearsal.
            served = _served_text(self._tokenizer, messages, tools, kwargs)
            if text != served:
                raise RowRejected(
                    "unlocatable_turn",
                    "the chat template could not be followed: transformers renders another text",
                )
            turns = _pair_anchors(program, self._anchors.turn_header, self._anchors.terminator)
            _require_own_turns(program, turns, messages)
            _require_parts_written(program, messages)
        except RowRejected as rejected:
            return RowRejected(rejected.reason, rejected.detail)  # kept: without a traceback
        return TurnPlaces.of(program.parts, turns, self._anchors)


def _render_rows(
    program: Program, places: TurnPlaces, numbers: list[int], strings: Sequence[Strings]
) -> RenderedRows | None:
    """Render rows of one program; None where a text has no bounds."""
    try:
        derived = [list(map(compute, strings)) for compute in places.computes]
    except Untraceable:
        return None
    lengths = np.array([list(map(len, column)) for column in derived], np.int64).T

    columns = iter(derived)
    parts = [repeat(part) if isinstance(part, str) else next(columns) for part in program.parts]
    texts = list(map("".join, zip(*parts, strict=False)))
    if max(map(len, texts)) > MAX_CHARACTERS:
        return None
    opening = program.parts[0] if isinstance(program.parts[0], str) else ""
    return RenderedRows(numbers, texts, places.spans(texts, lengths), opening)


# Turns of a program


def _pair_anchors(program: Program, header: str, terminator: str) -> list[Turn]:
    """Return the turns that a program writes: from each header to the next terminator.

    Headers before that terminator are of the same turn (reasoning in a block of its own).

    Raises:
        RowRejected: "unlocatable_turn": a turn has no terminator.
    """
    ends = _find_anchor(program, terminator)
    turns: list[Turn] = []
    for begin in _find_anchor(program, header):
        if turns and begin < turns[-1].end:
            continue

        header_end = Place(begin.part, begin.character + len(header))
        number = bisect_left(ends, header_end)
        if number == len(ends):
            raise RowRejected(
                "unlocatable_turn", f"assistant turn {len(turns)} is not ended by {terminator}"
            )
        end = ends[number]
        turns.append(Turn(begin, Place(end.part, end.character + len(terminator))))
    return turns


def _find_anchor(program: Program, anchor: str) -> list[Place]:
    """Return where an anchor is in the template's own text: in a program's literal parts."""
    places = []
    for number, part in enumerate(program.parts):
        if not isinstance(part, str):
            continue
        position = part.find(anchor)
        while position >= 0:
            places.append(Place(number, position))
            position = part.find(anchor, position + len(anchor))
    return places


def _require_own_turns(
    program: Program, turns: Sequence[Turn], messages: Sequence[Message]
) -> None:
    """Require one turn for each assistant message, with no text of another message in it.

    Raises:
        RowRejected: "unlocatable_turn"
    """
    answering = [
        number for number, message in enumerate(messages) if message.get("role") == "assistant"
    ]
    if len(turns) != len(answering):
        raise RowRejected(
            "unlocatable_turn",
            f"{len(answering)} assistant messages; the chat template begins {len(turns)} turns",
        )

    for number, (message, turn) in enumerate(zip(answering, turns, strict=True)):
        owners_of_parts = program.owners[turn.begin.part : turn.end.part]
        if not all(owners <= {message} for owners in owners_of_parts):
            raise RowRejected(
                "unlocatable_turn", f"assistant turn {number} would hold text of another message"
            )


def _require_parts_written(program: Program, messages: Sequence[Message]) -> None:
    """Require that something is written of each message whose content is a list of parts.

    Templates that know text only leave such content out without a word.

    Raises:
        RowRejected: "template_error"
    """
    written = frozenset[int]().union(*program.owners)
    for number, message in enumerate(messages):
        content = message.get("content")
        if number in written or not isinstance(content, (list, tuple)):
            continue
        if any(isinstance(part, Mapping) and "text" in part for part in content):
            raise RowRejected(
                "template_error",
                f"the chat template writes nothing of message {number}, whose content is a list of "
                "parts; join their texts",
            )


def _find_spans(
    anchors: Anchors, turns: Sequence[Turn], pieces: Sequence[str], text: str
) -> list[Span]:
    """Return where a program's turns lie in the text of one row."""
    header = anchors.turn_header
    starts = list(accumulate(map(len, pieces), initial=0))
    spans = []
    for turn in turns:
        begin = starts[turn.begin.part] + turn.begin.character
        if not text.startswith(header, begin):  # by text of the row's variables
            raise RowRejected("unlocatable_turn", "an assistant turn that begins in another way")
        header_end = begin + len(header)
        end = starts[turn.end.part] + turn.end.character

        start = header_end
        if text.startswith(anchors.generation_prompt, begin):
            start = begin + len(anchors.generation_prompt)
        answer = start
        for think in anchors.empty_thinks:
            if text.startswith(think, header_end):
                answer = max(start, header_end + len(think))
                break
        spans.append(Span(start, answer, end))
    return spans


# The text that transformers renders


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = False,
) -> str:
    """Return the conversation as transformers renders it, once a rehearsal has ended.

    Raises:
        RowRejected: "template_error": the template raised, or does not end; "unlocatable_turn": it
            does what cannot be rehearsed.
    """
    variables = {
        **tokenizer.special_tokens_map,
        **_without_date(tokenizer, template_kwargs),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        require_ends(str(tokenizer.chat_template), messages, tools, variables)
    except Unbounded as error:
        raise _endless(error) from error
    except Untraceable as error:
        raise RowRejected(
            "unlocatable_turn", f"the chat template cannot be followed: it takes {error}"
        ) from error
    return _served_text(tokenizer, messages, tools, template_kwargs, add_generation_prompt)


def _served_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = False,
) -> str:
    """Return the conversation as transformers renders it, in its sandbox, which has no limits.

    Raises:
        RowRejected: "template_error": the template raised.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **_without_date(tokenizer, template_kwargs),
        )
    except Exception as error:  # a template can fail in any way that Jinja and Python know
        detail = type(error).__name__
        if _quotes_template(error, str(tokenizer.chat_template)):
            detail = f"{detail}: {error}"[:_MAX_DETAIL_CHARACTERS]
        raise RowRejected("template_error", detail) from error
    return text


def _without_date(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the variables with which a text that holds today's date fails: no date is called."""
    if "strftime_now" in str(tokenizer.chat_template):
        return {**template_kwargs, "strftime_now": ""}
    return dict(template_kwargs)


def _endless(error: Unbounded) -> RowRejected:
    detail = f"the chat template does not end, or would make anything large: {error}"
    return RowRejected("template_error", detail)


def _quotes_template(error: Exception, template: str) -> bool:
    """Return whether an error's words are the template's own.

    Other words may be the row's, whose text must not get into the ledger.
    """
    quoted = [str(error)]
    if isinstance(error, jinja2.UndefinedError):
        quoted = re.findall("'(.*?)'", str(error))
    return all(words.endswith(" object") or words in template for words in quoted)


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in plain JSON data. Keys count, unless they are identifiers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and not key.isidentifier():
                yield key
            yield from strings_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_of(item)
