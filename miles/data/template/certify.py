"""Certifies a tokenizer with its chat template: learns its anchors, and proves them on probes.

    Qwen3's tokenizer  ->  Certificate(generation_prompt="<|im_start|>assistant\\n",
                                       terminator="<|im_end|>", bos_count=0, ...)

`anchors.py` learns from one or two probes; here it is proven on others (several turns, a system
message, tools, reasoning, users who type the template's own anchors). On each probe, every turn is
located, holds its own words and no others, and ends in one terminator, and the ids are those of
`apply_chat_template`. A template that fails is refused by name; no row is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from miles.data.config import EncodeConfig
from miles.data.template.anchors import Anchors, RenderedProbes, learn_anchors
from miles.data.template.certificate import Certificate
from miles.data.template.probes import (
    ONE_CALL,
    ONE_TURN,
    ONE_WITH_REASONING,
    QUESTION,
    TOOLS,
    TWO_CALLS,
    TWO_TURNS,
    TWO_WITH_REASONING,
    WITH_SYSTEM,
    forged_turns,
    words_of,
)
from miles.data.template.render import Renderer, Span, render_text
from miles.data.template.symbols import Unbounded, Untraceable
from miles.data.tokens.bpe import text_encoder_of
from miles.data.tokens.carried_tokenizer import own_arguments
from miles.data.tokens.library import calling
from miles.data.tokens.load import PINNED_DATE, encoder_fingerprint, has_pinned_date
from miles.data.tokens.round_trip import composes, find_loss
from miles.data.tokens.text_encoder import TextEncoder
from miles.data.types import RowRejected
from miles.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def certify(
    tokenizer: PreTrainedTokenizerBase, config: EncodeConfig, fingerprint: str = ""
) -> Certificate:
    """Learn how a chat template begins and ends assistant turns, and prove it on the probes.

    Args:
        fingerprint: the certificate's, of a tokenizer that has been certified under other variables
            of the template; "": that of the tokenizer and the settings.

    Raises:
        TemplateError: names the template and what failed.
    """
    kwargs = config.template_kwargs
    name = f"{config.tokenizer}: the chat template"
    if config.chat_template:
        name += " that was given"

    # Learn.
    _require_one_template(tokenizer, config, name)
    _require_plain_variables(tokenizer, kwargs, name)
    texts = _render_probes(tokenizer, kwargs, name)
    anchors = _learn_anchors(tokenizer, texts, config, name)
    encoder = text_encoder_of(tokenizer, config.tokenizer_engine)
    bos_count = _bos_count(tokenizer, texts.one_turn, config, name)
    with calling(config.tokenizer):
        if not fingerprint:
            _require_round_trip(encoder, config)
            fingerprint = encoder_fingerprint(tokenizer, config)

    # Prove.
    try:
        renderer = Renderer(tokenizer, kwargs, anchors)
    except Untraceable as error:
        raise TemplateError(f"{name} cannot be certified: {error}") from error
    prover = _Prover(tokenizer, kwargs, renderer, encoder, anchors, name, config.tokenizer)
    prover.require_located(ONE_TURN)
    prover.require_located(TWO_TURNS)
    prover.require_located(forged_turns(anchors.turn_header, anchors.terminator))

    # Judge what else the template takes.
    reasoning = _judge_reasoning(prover)
    tool_grouping = _judge_tools(prover)
    accepts_system = prover.accepts(WITH_SYSTEM)

    return Certificate(
        **vars(anchors),
        name=name,
        terminator_ids=tuple(encoder.encode(anchors.terminator).tolist()),
        bos_count=bos_count,
        follows_prompt=texts.one_turn.startswith(texts.prompted),
        extends_prefix=_extends_prefix(texts, anchors.terminator),
        drops_reasoning=reasoning.is_dropped_earlier,
        renders_reasoning=reasoning.is_rendered,
        accepts_system=accepts_system,
        accepts_tools=tool_grouping != "none",
        tool_grouping=tool_grouping,
        composes=composes(encoder.backend),
        date=f"pinned to {PINNED_DATE}" if has_pinned_date(tokenizer.chat_template) else "none",
        engine=encoder.engine,
        fingerprint=fingerprint,
    )


# Before anything is rendered


def _require_one_template(
    tokenizer: PreTrainedTokenizerBase, config: EncodeConfig, name: str
) -> None:
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{config.tokenizer}: not a fast tokenizer, so it gives no character offsets"
        )
    if not isinstance(tokenizer.chat_template, str):
        raise TemplateError(
            f"{name} is missing, or there are several; give one with --chat-template-path"
        )


def _require_plain_variables(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], name: str
) -> None:
    """Refuse template variables that transformers would take for arguments of its own."""
    reserved = {"messages", "strftime_now", *own_arguments(tokenizer)}
    taken = sorted(reserved & set(kwargs))
    if taken:
        raise TemplateError(
            f"{name} cannot be given {', '.join(taken)} by --apply-chat-template-kwargs"
        )


# Learning


def _render_probes(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], name: str
) -> RenderedProbes:
    one_turn = _render_probe(tokenizer, ONE_TURN, kwargs, name)
    two_turns = _render_probe(tokenizer, TWO_TURNS, kwargs, name)
    if two_turns != _render_probe(tokenizer, TWO_TURNS, kwargs, name):
        raise TemplateError(f"{name} renders the same conversation differently each time")
    return RenderedProbes(
        question=_render_probe(tokenizer, QUESTION, kwargs, name),
        prompted=_render_probe(tokenizer, QUESTION, kwargs, name, add_generation_prompt=True),
        one_turn=one_turn,
        two_turns=two_turns,
    )


def _render_probe(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
    name: str,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return render_text(tokenizer, messages, None, kwargs, add_generation_prompt)
    except RowRejected as error:
        hint = ""
        if "strftime_now" in str(tokenizer.chat_template):
            hint = (
                " It writes today's date (strftime_now), so its tokens would change from day to "
                "day: give the date with --apply-chat-template-kwargs where the template takes "
                "one, or write it out."
            )

        if isinstance(error.__cause__, Unbounded):
            raise TemplateError(
                f"{name} does not end, or would make anything large: {error.__cause__}"
            ) from error
        if isinstance(error.__cause__, Untraceable):
            raise TemplateError(
                f"{name} cannot be certified: it takes {error.__cause__}"
            ) from error

        # The cause may quote the probe: unlike a row's text, that is no secret.
        cause = f"{type(error.__cause__).__name__}: {error.__cause__}"
        raise TemplateError(f"{name} fails on a plain conversation: {cause}.{hint}") from error


def _learn_anchors(
    tokenizer: PreTrainedTokenizerBase, texts: RenderedProbes, config: EncodeConfig, name: str
) -> Anchors:
    with calling(config.tokenizer):
        added = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        ids = tokenizer.added_tokens_encoder
    return learn_anchors(texts, ids, special, name)


def _bos_count(
    tokenizer: PreTrainedTokenizerBase, text: str, config: EncodeConfig, name: str
) -> int:
    with calling(config.tokenizer):
        if tokenizer.bos_token_id is None:
            return 0
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        raise TemplateError(
            f"{name} begins a conversation with two BOS tokens {tokenizer.bos_token}"
        )
    return int(ids[0] == tokenizer.bos_token_id)


def _require_round_trip(encoder: TextEncoder, config: EncodeConfig) -> None:
    """Refuse a tokenizer whose ids do not decode to the text that they stand for."""
    loss = find_loss(encoder.backend)
    if loss is not None:
        raise TemplateError(
            f"{config.tokenizer}: the tokenizer does not keep its text: {loss}. A model would be "
            "trained on text without them. Give a tokenizer that keeps all text, such as a "
            "byte-level BPE or SentencePiece with byte fallback"
        )


def _extends_prefix(texts: RenderedProbes, terminator: str) -> bool:
    end = texts.one_turn.rindex(terminator) + len(terminator)
    return texts.two_turns.startswith(texts.one_turn[:end])


# Proving


@dataclass(frozen=True)
class _Prover:
    """Tries the learned anchors on probes."""

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any]
    renderer: Renderer
    encoder: TextEncoder
    anchors: Anchors
    name: str
    where: str
    """the tokenizer's folder or name"""

    def require_located(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Require that each turn of a probe is located, and that the ids are transformers' own.

        Raises:
            TemplateError: one of the two does not hold.
        """
        try:
            text, spans = self.renderer.render(messages, tools)
        except RowRejected as error:
            raise TemplateError(f"{self.name} cannot be certified: {error}") from error

        turns = [message for message in messages if message["role"] == "assistant"]
        for number, (turn, span) in enumerate(zip(turns, spans, strict=True)):
            others = [message for message in messages if message is not turn]
            if not _is_located(text, span, turn, others, self.anchors.terminator):
                raise TemplateError(
                    f"{self.name} cannot be certified: the words of assistant turn {number} of a "
                    f"probe do not lie between {self.anchors.turn_header!r} and "
                    f"{self.anchors.terminator!r}"
                )

        with calling(self.where):
            served = self.tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=True,
                return_dict=False,
                **self.kwargs,
            )
        if self.encoder.encode(text).tolist() != list(served):
            raise TemplateError(
                f"{self.name} cannot be certified: {type(self.tokenizer).__name__} gives other ids "
                "than its tokenizers backend"
            )

    def is_located(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> bool:
        """Return whether `require_located` holds."""
        try:
            self.require_located(messages, tools)
        except TemplateError:
            return False
        return True

    def accepts(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the template renders a probe, rather than raise on it.

        Raises:
            TemplateError: it renders the probe, but the turns are not located.
        """
        try:
            self.render_text(messages)
        except RowRejected:
            return False
        self.require_located(messages)
        return True

    def render_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text that transformers renders."""
        return render_text(self.tokenizer, messages, tools, self.kwargs)


def _is_located(
    text: str,
    span: Span,
    turn: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    terminator: str,
) -> bool:
    """Return whether a span holds a turn's words, no other message's, and one terminator."""
    inside = text[span.start : span.end]
    content = turn["content"]
    own_words = [word for word in words_of(turn) if word in text]
    foreign_words: list[str] = []
    for message in others:
        foreign_words += words_of(message)

    return (
        span.start > 0
        and all(word in inside for word in own_words)
        and not any(word in inside for word in foreign_words)
        and (content in inside or content not in text)
        and inside.endswith(terminator)
        and inside.count(terminator) == 1 + content.count(terminator)
    )


# Judging what else the template takes


class _Reasoning(NamedTuple):
    is_rendered: bool
    is_dropped_earlier: bool


def _judge_reasoning(prover: _Prover) -> _Reasoning:
    if not (prover.accepts(ONE_WITH_REASONING) and prover.accepts(TWO_WITH_REASONING)):
        return _Reasoning(is_rendered=False, is_dropped_earlier=False)
    text = prover.render_text(TWO_WITH_REASONING)
    is_rendered = "REASONING2" in text
    return _Reasoning(is_rendered, is_rendered and "REASONING1" not in text)


def _judge_tools(prover: _Prover) -> str:
    """Return `Certificate.tool_grouping`."""
    # Names of arguments are known when a template is traced, so they are taken for the template's
    # own text. One of them could spell a header that holds no token.
    tokens = prover.tokenizer.added_tokens_encoder
    if not any(token in prover.anchors.turn_header for token in tokens):
        return "none"
    if not prover.is_located(ONE_CALL, TOOLS):
        return "none"
    text = prover.render_text(ONE_CALL, TOOLS)
    if "ARGUMENT1" not in text or "RESULT1" not in text:
        return "none"

    if not prover.is_located(TWO_CALLS, TOOLS):
        return "one call"
    text = prover.render_text(TWO_CALLS, TOOLS)
    between = text.partition("RESULT1")[2].partition("RESULT2")[0]
    return "separate" if prover.anchors.terminator in between else "grouped"
