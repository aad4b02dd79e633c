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
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from miles.data.config import EncodeConfig
from miles.data.spans import render, strings
from miles.data.template import Certificate, certify, load_tokenizer
from miles.data.types import Conversation, Encoded, RowRejected

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
        """Encodes one conversation.

        Raises:
            RowRejected: special_text, template_error, unlocatable_turn, nothing_to_train, too_long, or
                bad_message for text that is not Unicode.
        """
        trained = self._trained_turns(conversation)
        if not any(trained):
            raise RowRejected("nothing_to_train", "no assistant turn is trained")
        if self.config.special_text == "reject":
            for own in strings([conversation.messages, conversation.tools]):
                if found := self._special_text.search(own):
                    raise RowRejected("special_text", found.group())
        if not self.certificate.accepts_tools and _calls_tools(conversation):
            raise RowRejected("unlocatable_turn", "tool calls, for which this chat template could not be certified")
        text, spans = render(
            self.tokenizer,
            conversation.messages,
            conversation.tools,
            self.config.template_kwargs,
            self.certificate,
        )
        try:
            # What tokenizer(text, add_special_tokens=False) comes down to; certify proves the two equal.
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeError, TypeError) as error:
            raise RowRejected("bad_message", "text that is not Unicode (a lone surrogate)") from error
        input_ids = np.array(encoding.ids, dtype=np.int32)
        if len(input_ids) > self.config.max_sample_tokens:
            raise RowRejected("too_long", f"{len(input_ids)} tokens, at most {self.config.max_sample_tokens}")

        loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
        num_straddling = 0
        for turn, (span, is_trained) in enumerate(zip(spans, trained, strict=True)):
            last = _token_at(encoding, span.end - 1)
            if input_ids[last] != self.certificate.terminator_id:
                raise RowRejected("unlocatable_turn", f"assistant turn {turn} does not end in one token of its own")
            if not is_trained:
                continue
            begin = span.start if self.config.empty_think == "train" else span.answer
            first = _token_at(encoding, begin)
            while encoding.token_to_chars(first)[0] < begin:
                first += 1
                num_straddling += 1
            assert 0 < first <= last, (first, last)
            loss_mask[first : last + 1] = 1
        return Encoded(input_ids, loss_mask, num_straddling)

    def _trained_turns(self, conversation: Conversation) -> list[bool]:
        """For each assistant message whether it is trained."""
        trained = [
            flag
            for message, flag in zip(conversation.messages, conversation.trained, strict=True)
            if message.get("role") == "assistant"
        ]
        if self.config.turns == "last":
            trained[:-1] = [False] * (len(trained) - 1)
        return trained

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))


def _calls_tools(conversation: Conversation) -> bool:
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in conversation.messages)


def _token_at(encoding: Encoding, position: int) -> int:
    """The first token that holds the character at `position`."""
    token = encoding.char_to_token(position)
    if token is None:  # a character that the normalizer removed: the first token behind it
        token = bisect_left(encoding.offsets, (position,))
    return int(token)


def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: str = "all",
    empty_think: str = "mask",
    special_text: str = "allow",
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
        turns: which assistant turns are trained, "all" or "last".
        empty_think: "mask" or "train" an empty think block that the template puts before an answer.
        special_text: "allow" or "reject" content that spells a special token.
        max_sample_tokens: more tokens than this are rejected.
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
        special_text=special_text,
        max_sample_tokens=max_sample_tokens,
    )
    trained = tuple(message.get("role") == "assistant" for message in messages)
    conversation = Conversation(tuple(messages), None if tools is None else tuple(tools), trained)
    return _encoder_of(tokenizer, config).encode(conversation)


_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, Encoder]] = weakref.WeakKeyDictionary()


def _encoder_of(tokenizer: PreTrainedTokenizerBase, config: EncodeConfig) -> Encoder:
    """Certifies once for each tokenizer and what was set on it since: template, special and added tokens."""
    key = repr((config, tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)))
    cached = _encoders.setdefault(tokenizer, {})
    if key not in cached:
        cached[key] = Encoder(tokenizer, config, certify(tokenizer, config))
    return cached[key]
