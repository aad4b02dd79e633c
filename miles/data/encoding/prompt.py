"""The ids of a prompt: those that training saw before the answer.

    user "2+2?"   ->   <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n
                                                                              the model goes on here

There is no second way through the template. The conversation gets an answer that stands for any,
is encoded as a row of training data, and is cut where the trained tokens of that answer begin. So
the prompt is a prefix of the sample that training would make of the same conversation.

Where a template puts an empty think block before an answer, training masks it (`--empty-think`): a
model that was trained on answers without reasoning has always seen the block, and never learned to
write it. For such a model the prompt ends behind the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from miles.data.encoding.encoder import Encoder
from miles.data.types import Conversation, Int32

_ANSWER = "ANSWER"
"""Stands for any answer. Its first letter merges with no blank or newline before it."""
_NO_LIMIT = 2**31 - 1


class PromptEncoder:
    """Encodes conversations up to an answer that is yet to be written.

    Args:
        encoder: certified, with the settings of the training.
        after_empty_think: end a prompt behind an empty think block, where the template writes one
            before an answer without reasoning; else before it.
    """

    def __init__(self, encoder: Encoder, *, after_empty_think: bool = False) -> None:
        config = replace(
            encoder.config,
            turns="all",
            empty_think="mask" if after_empty_think else "train",
            empty_answer="train",
            too_long="drop",
            max_sample_tokens=_NO_LIMIT,
        )
        self.certificate = encoder.certificate
        self._tokenizer = encoder.tokenizer
        self._encoder = Encoder(encoder.tokenizer, config, encoder.certificate)

    @property
    def terminator_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, one after another: those that end a trained turn."""
        return self.certificate.terminator_ids

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Int32:
        """Return the ids of a prompt, int32 [tokens].

        Args:
            messages: the conversation so far; the assistant is to speak next.
            tools: that it may call.
            template_kwargs: variables of the conversation for the template.

        Raises:
            RowRejected: what training would reject the conversation for.
        """
        answered = (*messages, {"role": "assistant", "content": _ANSWER})
        flags = (*[False] * len(messages), True)
        conversation = Conversation(
            answered, None if tools is None else tuple(tools), flags, None, template_kwargs or {}
        )
        sample = self._encoder.encode(conversation)
        begin = int(np.flatnonzero(sample.loss_mask)[0])

        # A token that reaches into the answer is not part of the prompt as it is served.
        return sample.input_ids[: begin - sample.num_straddling_tokens]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of [tokens], control tokens written out."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
