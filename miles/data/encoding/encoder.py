"""A conversation -> token ids, and a mask of the tokens that are trained.

    <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n4 <|im_end|> \\n
    0                                                       0 (empty_think="mask")  1     1      0

The ids are always those of `tokenizer.apply_chat_template(messages, tools=tools, tokenize=True,
return_dict=False, **template_kwargs)`. A token is trained where, in serving, the model itself would have to
produce it: all of a trained assistant turn behind the generation prompt, its terminator included; not the
newline behind that, nor anything that the generation prompt supplies. A token that begins before a turn and
ends inside it (a header's newline merged with the answer's) is one that serving never produces: it is
not trained, and counted.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from miles.data.config import EncodeConfig
from miles.data.encoding.escape import Escaper, any_of
from miles.data.template.certify import Certificate, certify, load_tokenizer
from miles.data.template.render import Renderer, Span, strings
from miles.data.tokens.bpe import TextEncoder, Tokens, text_encoder
from miles.data.types import Conversation, Encoded, Int32, RowRejected, UInt8
from miles.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

DEFAULT_MAX_SAMPLE_TOKENS = EncodeConfig(tokenizer="").max_sample_tokens


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, its certificate and the policies: `encode` is a pure function of a conversation."""

    tokenizer: PreTrainedTokenizerBase
    config: EncodeConfig
    certificate: Certificate

    @classmethod
    def from_config(cls, config: EncodeConfig) -> Encoder:
        """Loads and certifies what `config` names.

        Raises:
            TemplateError: the tokenizer cannot be loaded, or its template cannot be certified.
        """
        tokenizer = load_tokenizer(config)
        return cls(tokenizer, config, certify(tokenizer, config))

    @property
    def fingerprint(self) -> str:
        """Equal for two encoders that make the same of every conversation."""
        return self.certificate.fingerprint

    def encode(self, conversation: Conversation) -> Encoded:
        """Encodes one conversation, or plain text.

        Raises:
            RowRejected: special_text, template_error, unlocatable_turn, nothing_to_train, too_long; bad_message for
                text that is not Unicode; malformed_json for data nested too deeply.
        """
        (outcome,) = self.encode_all([conversation])
        if isinstance(outcome, RowRejected):
            raise outcome
        return outcome

    def encode_all(self, conversations: Sequence[Conversation]) -> list[Encoded | RowRejected]:
        """As `encode`, for many; what it would raise is in its row's place."""
        outcomes: list[Encoded | RowRejected | _Rendered] = [
            or_rejected(self._begin, conversation) for conversation in conversations
        ]
        rendered = [outcome for outcome in outcomes if isinstance(outcome, _Rendered)]
        tokens = self._text_tokens.encode_all(
            [row.text for row in rendered], [self._edges(row.spans) for row in rendered]
        )
        encoded = iter(
            [or_rejected(self._mark, row, made) for row, made in zip(rendered, tokens, strict=True)]
        )
        return [
            next(encoded) if isinstance(outcome, _Rendered) else outcome for outcome in outcomes
        ]

    def _begin(self, conversation: Conversation) -> Encoded | _Rendered:
        """Renders a conversation; what does not go the usual way is encoded at once."""
        if conversation.text is not None:
            return self._encode_text(conversation.text)
        trained = self._trained_turns(conversation)
        if True not in trained:
            raise RowRejected("nothing_to_train", "no assistant turn is trained")
        if not self.certificate.accepts_tools and _calls_tools(conversation):
            raise RowRejected(
                "unlocatable_turn",
                "tool calls, for which this chat template could not be certified",
            )
        if self.config.special_text != "allow" and self._spells_control(conversation):
            return self._escaped(conversation, trained)
        row = _Rendered(*self._renderer.render(conversation.messages, conversation.tools), trained)
        self._require_short(row.text)
        return row

    def _trained_turns(self, conversation: Conversation) -> list[bool]:
        """For each assistant message whether it is trained."""
        unflagged = self.config.turns != "flags"
        trained = [
            unflagged if flag is None else flag
            for message, flag in zip(conversation.messages, conversation.flags, strict=True)
            if message.get("role") == "assistant"
        ]
        if self.config.turns == "last":
            trained[:-1] = [False] * (len(trained) - 1)
        return trained

    def _edges(self, spans: Sequence[Span]) -> list[int]:
        """Where each turn's trained text begins and its terminator does, in turn."""
        length = len(self.certificate.terminator)
        if self.config.empty_think == "train":
            return [edge for span in spans for edge in (span.start, span.end - length)]
        return [edge for span in spans for edge in (span.answer, span.end - length)]

    def _mark(self, row: _Rendered, tokens: Tokens | RowRejected) -> Encoded:
        """The mask of tokens, from where each turn's edges are in them."""
        if isinstance(tokens, RowRejected):
            raise tokens
        ids, first, straddled = tokens
        loss_mask = np.zeros(len(ids), dtype=np.uint8)
        terminator = list(self.certificate.terminator_ids)
        num_straddling = 0
        for turn, is_trained in enumerate(row.trained):
            begin, last = first[2 * turn], first[2 * turn + 1]
            end = last + len(terminator)
            if straddled[2 * turn + 1] or ids[last:end].tolist() != terminator:
                raise RowRejected(
                    "unlocatable_turn", f"assistant turn {turn} does not end in tokens of its own"
                )
            if is_trained:
                assert 0 < begin <= last, (begin, last)
                loss_mask[begin:end] = 1
                num_straddling += straddled[2 * turn]
        return self._finish(ids, loss_mask, num_straddling)

    def _finish(self, ids: Int32, loss_mask: UInt8, num_straddling: int = 0) -> Encoded:
        """Applies the length limit."""
        limit = self.config.max_sample_tokens
        is_truncated = len(ids) > limit
        if is_truncated:
            if self.config.too_long != "truncate_end":
                raise RowRejected("too_long", f"{len(ids)} tokens, at most {limit}")
            ids, loss_mask = ids[:limit].copy(), loss_mask[:limit].copy()
            if not loss_mask[1:].any():
                raise RowRejected("nothing_to_train", f"no trained token within the first {limit}")
        return Encoded(ids, loss_mask, num_straddling, is_truncated)

    def _require_short(self, text: str) -> None:
        """Drops by its length alone what would cost minutes to encode for nothing."""
        limit = self.config.max_sample_tokens
        if self.config.too_long != "truncate_end" and self._text_tokens.is_surely_longer(
            text, limit
        ):
            raise RowRejected("too_long", f"{len(text)} characters, at most {limit} tokens")

    def _encode_text(self, text: str) -> Encoded:
        """Plain text, what the tokenizer puts around it, and EOS; all is trained but what is put before."""
        self._require_short(text)
        if self.config.special_text == "reject" and (special := self._special_text.search(text)):
            raise RowRejected("special_text", special.group())
        if self.config.special_text == "escape" and self._escaper.concerns([text]):
            ids = self._escaper.encode_at(self._escaper.mark(text), ()).ids
        else:
            ids = self._text_tokens.encode(text)
        before, behind = self._around_text
        ids = np.concatenate([before, ids, behind])
        loss_mask = np.ones(len(ids), np.uint8)
        loss_mask[: len(before)] = 0
        if len(ids) < 2:  # no position has a label
            raise RowRejected(
                "nothing_to_train", f"{len(ids)} tokens, and the first has none before it"
            )
        return self._finish(ids, loss_mask)

    def _spells_control(self, conversation: Conversation) -> bool:
        """Whether the row must be escaped.

        Raises:
            RowRejected: it spells a special token, and such rows are rejected.
        """
        own = list(strings([conversation.messages, conversation.tools]))
        if self.config.special_text == "escape":
            return self._escaper.concerns(own)
        for text in own:
            if found := self._special_text.search(text):
                raise RowRejected("special_text", found.group())
        return False

    def _escaped(self, conversation: Conversation, trained: Sequence[bool]) -> Encoded:
        messages, tools = (
            list(conversation.messages),
            conversation.tools and list(conversation.tools),
        )
        row = _Rendered(
            *self._renderer.render(self._escaper.mark(messages), self._escaper.mark(tools)), trained
        )
        self._require_short(row.text)
        tokens = self._escaper.encode_at(row.text, self._edges(row.spans))
        try:
            served = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **self.config.template_kwargs,
            )
        except ValueError as error:  # a token that plain text makes, too
            raise RowRejected(
                "special_text", "a control token that cannot be written as ordinary text"
            ) from error
        if tokens.ids.tolist() != list(served):
            raise RowRejected(
                "special_text", "control tokens that transformers escapes in another way"
            )
        return self._mark(row, tokens)

    @cached_property
    def _text_tokens(self) -> TextEncoder:
        return text_encoder(self.tokenizer.backend_tokenizer)

    @cached_property
    def _around_text(self) -> tuple[Int32, Int32]:
        """Ids that stand before and behind plain text: the tokenizer's own, and EOS."""
        backend = self._text_tokens.backend
        plain = backend.encode("a", add_special_tokens=False).ids
        whole = backend.encode("a", add_special_tokens=True).ids
        begin = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        behind = whole[begin + len(plain) :]
        eos = self.tokenizer.eos_token_id
        if eos is not None and eos not in behind:
            behind = [*behind, eos]
        return np.array(whole[:begin], np.int32), np.array(behind, np.int32)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.config.template_kwargs, self.certificate)

    @cached_property
    def _escaper(self) -> Escaper:
        return Escaper(self.tokenizer, self._text_tokens)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        return any_of(
            [
                token.content
                for token in self.tokenizer.added_tokens_decoder.values()
                if token.special
            ]
        )


class _Rendered(NamedTuple):
    """A conversation on its way."""

    text: str
    spans: Sequence[Span]
    trained: Sequence[bool]
    """whether each assistant turn is trained"""


def or_rejected(step: Callable[..., _T], *arguments: Any) -> _T | RowRejected:
    """What a step gives, or why it rejects its row."""
    try:
        return step(*arguments)
    except RowRejected as rejected:
        return rejected
    except RecursionError:
        return RowRejected("malformed_json", "nested too deeply")


def _calls_tools(conversation: Conversation) -> bool:
    return any(
        message.get("tool_calls") or message.get("role") == "tool"
        for message in conversation.messages
    )


def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: str = "all",
    flags: Sequence[bool | None] | None = None,
    empty_think: str = "mask",
    history: str = "as_served",
    special_text: str = "allow",
    too_long: str = "drop",
    max_sample_tokens: int = DEFAULT_MAX_SAMPLE_TOKENS,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encodes one conversation with a tokenizer at hand.

        >>> encoded = encode([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], tokenizer)
        >>> tokenizer.decode(encoded.input_ids[encoded.loss_mask == 1])
        '4<|im_end|>'

    Args:
        messages: OpenAI messages (plain JSON types).
        tokenizer: a fast tokenizer with a chat template; certified at the first call.
        tools: JSON schemas of functions.
        turns: which assistant turns are trained: "all", "last", or those with a true flag ("flags").
        flags: for each message whether it is to be trained; None: nothing is said. A false one excludes its turn.
        empty_think: "mask" or "train" an empty think block that the template puts before an answer.
        history: earlier turns as the template renders them ("as_served").
        special_text: content that spells a control token: "allow" it to be one, "escape" it to ordinary text (as
            `apply_chat_template(..., sanitize_control_tokens=True)`), or "reject".
        too_long: a conversation of more than `max_sample_tokens`: "drop" or "error" reject it, "truncate_end" cuts.
        template_kwargs: further variables for the template.

    Raises:
        TemplateError: the template cannot be certified.
        RowRejected: the conversation cannot be used; it says why.
    """
    config = EncodeConfig(
        tokenizer=str(tokenizer.name_or_path) or type(tokenizer).__name__,
        template_kwargs=dict(template_kwargs or {}),
        turns=turns,
        empty_think=empty_think,
        history=history,
        special_text=special_text,
        too_long=too_long,
        max_sample_tokens=max_sample_tokens,
    )
    said = tuple(flags) if flags is not None else (None,) * len(messages)
    if len(said) != len(messages):
        raise ConfigError(
            f"flags has {len(said)} entries for {len(messages)} messages; give one for each"
        )
    conversation = Conversation(tuple(messages), None if tools is None else tuple(tools), said)
    return _encoder_of(tokenizer, config).encode(conversation)


_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, Encoder]] = (
    weakref.WeakKeyDictionary()
)


def _encoder_of(tokenizer: PreTrainedTokenizerBase, config: EncodeConfig) -> Encoder:
    """Certifies once for each tokenizer and what was set on it since: template, special and added tokens."""
    key = repr((config, tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)))
    cached = _encoders.setdefault(tokenizer, {})
    if key not in cached:
        cached[key] = Encoder(tokenizer, config, certify(tokenizer, config))
    return cached[key]
