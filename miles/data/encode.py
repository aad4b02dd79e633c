"""A conversation -> token ids and loss mask.

Ids are exactly what `tokenizer.apply_chat_template(messages, tokenize=True)` gives. A token is trained if, in
serving, the model would have had to produce it: everything of a trained assistant turn after the generation
prompt, up to and including the turn's terminator. For ChatML:

    <|im_start|>assistant\n Hello ! <|im_end|> \n
         0        0        0  1   1      1      0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from miles.data import template
from miles.data.config import EncodeConfig
from miles.data.types import Conversation, Encoded, RowRejected


@dataclass(frozen=True)
class Encoder:
    """A certified tokenizer with its policies."""

    config: EncodeConfig
    tokenizer: Any
    certificate: template.Certificate

    @classmethod
    def from_config(cls, config: EncodeConfig) -> Encoder:
        """Loads and certifies the tokenizer.

        Raises:
            TemplateError: it cannot be loaded or certified.
        """
        tokenizer = template.load_tokenizer(config)
        return cls(config, tokenizer, template.certify(tokenizer, config))

    @property
    def fingerprint(self) -> str:
        return template.encoder_fingerprint(self.tokenizer, self.config)

    def encode(self, conversation: Conversation) -> Encoded:
        """Renders and tokenises the whole conversation once, and marks what is trained.

        Raises:
            RowRejected: with the reason, for a conversation that cannot be used.
        """
        config, certificate = self.config, self.certificate
        if config.special_text == "reject":
            self._reject_special_text(conversation)
        text, spans = template.render_with_spans(
            self.tokenizer,
            conversation.messages,
            conversation.tools,
            config.template_kwargs,
            certificate.generation_prompt,
            certificate.terminator,
        )
        turns = [index for index in sorted(spans) if conversation.trained[index]]
        if config.turns == "last":
            turns = [index for index in turns if index == max(spans)]
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if len(ids) > config.max_sample_tokens:
            raise RowRejected("too_long", f"{len(ids)} tokens, more than {config.max_sample_tokens}")
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), np.uint8)
        straddling = 0
        for start, end in (self._trained_span(text, spans[index]) for index in turns):
            first = int(np.searchsorted(offsets[:, 0], start, side="left"))
            last = int(np.searchsorted(offsets[:, 1], end, side="right"))
            mask[first:last] = 1
            straddling += first > 0 and offsets[first - 1, 1] > start
        if not mask[1:].any():
            raise RowRejected("nothing_to_train", "no token of an assistant turn is trained")
        return Encoded(ids, mask, straddling)

    def _trained_span(self, text: str, span: template.Span) -> template.Span:
        """The span without an empty think block that is masked by policy or supplied by the prompt."""
        start, end = span
        empty = self.certificate.empty_think
        mask_it = self.config.empty_think == "mask" or self.certificate.prompt_supplies_think
        if empty and mask_it and text.startswith(empty, start):
            start += len(empty)
        return start, end

    def _reject_special_text(self, conversation: Conversation) -> None:
        special = [str(token) for token in self.tokenizer.all_special_tokens]
        for index, message in enumerate(conversation.messages):
            if any(token in (message.get("content") or "") for token in special):
                raise RowRejected("special_text", f"message {index} spells a special token")


@lru_cache(maxsize=4)
def _encoder(config_key: str, tokenizer_key: int, holder: _Held) -> Encoder:
    return Encoder(holder.config, holder.tokenizer, template.certify(holder.tokenizer, holder.config))


@dataclass(frozen=True)
class _Held:
    """Arguments of `_encoder` that have no hash; the other arguments stand for their content."""

    config: EncodeConfig
    tokenizer: Any

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)


def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: str = "all",
    empty_think: str = "mask",
    special_text: str = "allow",
    max_sample_tokens: int = 1 << 30,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encodes one conversation.

    Args:
        messages: OpenAI messages; assistant turns are trained.
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        tools: for the template.
        turns: which assistant turns are trained: "all" or "last".
        empty_think: "mask" or "train" an empty think block that the template puts before an answer.
        special_text: "allow" or "reject" content that spells a special token.
        max_sample_tokens: a longer conversation is refused.
        template_kwargs: further arguments of the template.

    Returns:
        `input_ids` int32 [tokens] and `loss_mask` uint8 [tokens]. The ids equal
        `tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)`.

    Raises:
        RowRejected: the conversation cannot be used, with the reason.
        TemplateError: the template cannot be certified.
    """
    config = EncodeConfig(
        tokenizer=str(tokenizer.name_or_path),
        turns=turns,
        empty_think=empty_think,
        special_text=special_text,
        max_sample_tokens=max_sample_tokens,
        template_kwargs=dict(template_kwargs or {}),
    )
    key = template.encoder_fingerprint(tokenizer, config)
    encoder = _encoder(key, id(tokenizer), _Held(config, tokenizer))
    trained = tuple(message.get("role") == "assistant" for message in messages)
    return encoder.encode(Conversation(tuple(messages), tuple(tools) if tools else None, trained))
