"""Encodes the rows of a whole step together: one text, one call of the engine, arithmetic on arrays.

    conversations ─ plain ─> grouped by roles, then by program ─> texts and spans of each group
                  └ others ─> rendered one by one               ─> text and spans
    all texts end to end  ->  ids, tokens at the spans' edges  ->  ids and loss masks end to end

The result is that of `Encoder.encode` for each row, which defines it. The checks here only sort out
the rows on which one of them might fail: an answer that may say nothing, a text that NFC may
change, a terminator that is not encoded as its own tokens. Such a row is encoded by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.config import EncodeConfig
from miles.data.encoding.empty_answer import begins_word, is_blank, shows_nothing
from miles.data.encoding.loss_mask import mark_points, select_turns
from miles.data.encoding.plain_rows import PlainRows, plain_rows
from miles.data.encoding.samples import encoded_rows, merged, taken
from miles.data.encoding.step_texts import StepTexts, Turns
from miles.data.rejecting import or_rejected
from miles.data.template.certificate import Certificate
from miles.data.template.render import RenderedRows, Renderer, Span
from miles.data.tokens.text_encoder import JoinedTokens, TextEncoder
from miles.data.types import (
    Bool,
    Conversation,
    Encoded,
    EncodedRows,
    Int32,
    Int64,
    RowRejected,
    Samples,
    UInt8,
)

_JOINED_CHARACTERS = 4 << 20
"""Texts are joined up to this length, or one text alone: bounds the memory for a step."""

Outcomes = dict[int, Encoded | RowRejected]
"""Rows that were encoded by themselves, by number."""


class RenderedRow(NamedTuple):
    """A conversation between rendering and encoding."""

    text: str
    spans: Sequence[Span]
    selected: Sequence[bool]
    """whether each assistant turn is trained"""
    certificate: Certificate
    """under the variables of the row"""


@dataclass(frozen=True)
class StepEncoder:
    """Encodes many rows for an `Encoder`, which gives it all of this."""

    config: EncodeConfig
    certificate: Certificate
    renderer: Renderer
    text_encoder: TextEncoder
    silent_tokens: tuple[str, ...]
    """as for `require_answers`"""
    spells_special: Callable[[Sequence[str]], bool]
    """whether rows with such strings are escaped, or rejected"""
    render: Callable[[Conversation], RenderedRow | Encoded]
    """one row; raises RowRejected"""
    encode: Callable[[Conversation], Encoded]
    """one row; raises RowRejected"""
    limit_length: Callable[[Int32, UInt8, int], Encoded]
    """ids, mask and straddling tokens of one row; raises RowRejected"""

    def encode_rows(self, conversations: Sequence[Conversation]) -> EncodedRows:
        """Encode many conversations as `encode` does each."""
        outcomes: Outcomes = {}
        parts: list[tuple[Int64, Samples]] = []
        if self.text_encoder.joins:
            texts = StepTexts(len(conversations))
            self._render_plain(conversations, texts)
            self._render_others(conversations, texts, outcomes)
            for rows in texts.groups(_JOINED_CHARACTERS):
                parts += self._encode_together(rows, texts, outcomes)

        is_left = np.ones(len(conversations), np.bool_)
        is_left[list(outcomes)] = False
        for rows, _ in parts:
            is_left[rows] = False
        for row in np.flatnonzero(is_left).tolist():
            outcomes[row] = or_rejected(self.encode, conversations[row])
        return merged(parts, encoded_rows(outcomes))

    # Conversations -> texts and turns

    def _render_plain(self, conversations: Sequence[Conversation], texts: StepTexts) -> None:
        """Render together the plain rows whose program is known, but for doubtful ones."""
        for plain in plain_rows(conversations):
            if "assistant" not in plain.roles:
                continue
            if "tool" in plain.roles and not self.certificate.accepts_tools:
                continue

            for rendered in self.renderer.render_known(plain.roles, plain.contents):
                group = plain.subset(rendered.numbers)
                is_trained = self._select_turns([conversations[row] for row in group.rows])
                is_kept: Bool = np.asarray(is_trained.any(axis=1))
                is_kept[list(self._doubtful(group, rendered))] = False
                starts, answers, ends = rendered.spans
                turns = Turns(
                    rows=np.repeat(np.array(group.rows, np.int64), is_trained.shape[1]),
                    begins=(starts if self._trains_thinks else answers).ravel(),
                    terminators=(ends - len(self.certificate.terminator)).ravel(),
                    is_trained=is_trained.ravel(),
                )
                opens = self.text_encoder.opens(rendered.opening)
                texts.add_rows(group.rows, rendered.texts, turns, is_kept, opens)

    def _render_others(
        self, conversations: Sequence[Conversation], texts: StepTexts, outcomes: Outcomes
    ) -> None:
        """Render one by one the rows without a text. Some of them are done with that."""
        for row in texts.missing_rows():
            rendered = or_rejected(self.render, conversations[row])
            if not isinstance(rendered, RenderedRow):
                outcomes[row] = rendered
                continue
            certificate = rendered.certificate
            if certificate.terminator_ids != self.certificate.terminator_ids:
                continue
            points = mark_points(rendered.spans, certificate.terminator, self.config.empty_think)
            opens = self.text_encoder.opens(rendered.text)
            texts.add_row(row, rendered.text, points, rendered.selected, opens)

    @property
    def _trains_thinks(self) -> bool:
        return self.config.empty_think == "train"

    def _select_turns(self, conversations: Sequence[Conversation]) -> Bool:
        """Return which turns are trained: bool [rows, turns]; the rows have the same roles."""
        no_flags = (None,) * len(conversations[0].messages)
        is_flagged = [conversation.flags != no_flags for conversation in conversations]
        turns = self.config.turns
        if any(is_flagged):
            return np.array([select_turns(row, turns) for row in conversations], np.bool_)
        selected = np.array(select_turns(conversations[0], turns), np.bool_)
        return np.tile(selected, (len(conversations), 1))

    # Checks: each finds the rows on which its single row's form might fail

    def _doubtful(self, group: PlainRows, rendered: RenderedRows) -> set[int]:
        """Return the rows, by number in the group, that have to be rendered by themselves."""
        doubtful: set[int] = set()
        if self.config.special_text != "allow":
            doubtful.update(
                number
                for number, contents in enumerate(group.contents)
                if self.spells_special((*group.roles, *contents))
            )

        if self.config.too_long != "truncate_end":
            limit = self.text_encoder.max_characters(self.config.max_sample_tokens)
            if limit is not None and max(map(len, rendered.texts)) > limit:
                doubtful.update(
                    number for number, text in enumerate(rendered.texts) if len(text) > limit
                )

        if self.config.empty_answer == "drop":
            doubtful |= self._blank_answers(group)
            doubtful |= self._unwritten_answers(rendered)
        return doubtful

    def _blank_answers(self, group: PlainRows) -> set[int]:
        """Return the rows with an answer that says nothing (`require_answers`)."""
        blank: set[int] = set()
        for message, role in enumerate(group.roles):
            if role != "assistant":
                continue
            answers = list(map(itemgetter(message), group.contents))
            for number in _not_beginning(answers, begins_word):
                if is_blank(answers[number], self.silent_tokens):
                    blank.add(number)
        return blank

    def _unwritten_answers(self, rendered: RenderedRows) -> set[int]:
        """Return the rows with a turn in which nothing is written (`require_written`)."""
        unwritten: set[int] = set()
        num_terminator = len(self.certificate.terminator)
        _, answers, ends = rendered.spans
        for turn in range(answers.shape[1]):
            begins = answers[:, turn].tolist()
            firsts = [text[begin] for text, begin in zip(rendered.texts, begins, strict=True)]
            for number in _not_beginning(firsts, str.isalnum):
                end = int(ends[number, turn]) - num_terminator
                if shows_nothing(rendered.texts[number], begins[number], end):
                    unwritten.add(number)
        return unwritten

    # Texts and turns -> samples

    def _encode_together(
        self, rows: Int64, texts: StepTexts, outcomes: Outcomes
    ) -> list[tuple[Int64, Samples]]:
        """Encode rows whose texts begin with an added token.

        A row that is neither in the result nor in `outcomes` has to be encoded by itself.
        """
        joined = self.text_encoder.join(texts.of_rows(rows))
        if joined is None or not len(joined.numbers):
            return []
        rows = rows[joined.numbers]
        samples, is_kept = self._mask(joined, texts.turns_of(rows))

        too_long = np.flatnonzero(is_kept & (samples.lengths > self.config.max_sample_tokens))
        offsets = offsets_of(samples.lengths)
        for number in too_long.tolist():
            tokens = slice(offsets[number], offsets[number + 1])
            outcomes[int(rows[number])] = or_rejected(
                self.limit_length,
                samples.input_ids[tokens],
                samples.loss_mask[tokens],
                int(samples.num_straddling_tokens[number]),
            )
        is_kept[too_long] = False
        if is_kept.all():
            return [(rows, samples)]
        return [(rows[is_kept], taken(samples, np.flatnonzero(is_kept)))]

    def _mask(self, joined: JoinedTokens, turns: Turns) -> tuple[Samples, Bool]:
        """Return the samples of texts, and whether each turn of a text ends in its own tokens.

        Args:
            turns: of the texts; `rows` are the numbers of the texts.
        """
        text_starts = joined.text_starts
        text_tokens, _ = joined.tokens_at(text_starts)
        offsets = text_starts[turns.rows]
        begins, is_straddled = joined.tokens_at(offsets + turns.begins)
        terminators, is_torn = joined.tokens_at(offsets + turns.terminators)

        # As `decide_loss_mask`: the terminator's own tokens, within the text.
        terminator = self.certificate.terminator_ids
        ends = terminators + len(terminator)
        is_own = ~is_torn & (ends <= text_tokens[turns.rows + 1])
        for place, token in enumerate(terminator):
            is_own &= joined.ids.take(terminators + place, mode="clip") == token
        is_sound = np.ones(len(text_starts) - 1, np.bool_)
        is_sound[turns.rows[~is_own]] = False

        is_trained = turns.is_trained & is_own
        begins, ends = begins[is_trained], ends[is_trained]
        texts = turns.rows[is_trained]
        assert (begins > text_tokens[texts]).all()
        assert (begins <= terminators[is_trained]).all()

        # Trained stretches do not overlap: the running sum of their edges is 0 or 1.
        edges = np.zeros(len(joined.ids) + 1, np.int8)
        edges[begins] += 1
        edges[ends] -= 1
        straddling = np.bincount(texts[is_straddled[is_trained]], minlength=len(is_sound))
        samples = Samples(
            lengths=np.diff(text_tokens).astype(np.int32),
            input_ids=joined.ids,
            loss_mask=edges[:-1].cumsum(dtype=np.int8).view(np.uint8),
            num_straddling_tokens=straddling.astype(np.int32),
            is_truncated=np.zeros(len(is_sound), np.bool_),
        )
        return samples, is_sound


def _not_beginning(texts: Sequence[str], begins: Callable[[str], bool]) -> list[int]:
    """Return the numbers of the texts whose first character does not begin an answer.

    Args:
        begins: tells it of a text of one character, or none. It is asked once for each such text.
    """
    firsts = [text[:1] for text in texts]
    others = {first for first in set(firsts) if not begins(first)}
    if not others:
        return []
    return [number for number, first in enumerate(firsts) if first in others]
