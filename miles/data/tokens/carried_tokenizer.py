"""A tokenizer that is made from data, without transformers and torch.

    driver    AutoTokenizer.from_pretrained(…)  ->  TokenizerFacts, definition   (JSON)
    loader    TokenizerFacts, definition        ->  CarriedTokenizer

It has those parts of `PreTrainedTokenizerBase` that encoding, certifying and decoding use, with the
same results. The tokenizer of `tokenizers` behind it is made when it is first needed: most rows are
encoded without it. transformers is loaded only for what it alone knows: how it escapes control
tokens.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers

from miles.common import free_memory
from miles.data.tokens.served_chat import served_text
from miles.data.tokens.text_encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AddedToken:
    """An added token, as far as it matters here."""

    content: str
    special: bool


@dataclass(frozen=True)
class TokenizerFacts:
    """The facts about a tokenizer beside its vocabulary; plain JSON types."""

    chat_template: str
    special_tokens_map: Mapping[str, str]
    added_tokens: Sequence[tuple[int, str, bool]]
    """id, content, and whether it is special; in the tokenizer's order"""
    chat_control_tokens: Sequence[str] | None
    bos_token_id: int | None
    eos_token_id: int | None
    own_arguments: Sequence[str]
    """names that `apply_chat_template` takes for arguments of its own"""
    serving_ends: Sequence[int]
    """tokens at which a server stops, by the generation_config.json beside the tokenizer"""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, serving_ends: Sequence[int]) -> TokenizerFacts:
        """Read the facts of a tokenizer."""
        return cls(
            chat_template=str(tokenizer.chat_template),
            special_tokens_map=dict(tokenizer.special_tokens_map),
            added_tokens=[
                (number, token.content, bool(token.special))
                for number, token in tokenizer.added_tokens_decoder.items()
            ],
            chat_control_tokens=tokenizer.chat_control_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            own_arguments=sorted(own_arguments(tokenizer)),
            serving_ends=list(serving_ends),
        )


@dataclass
class CarriedTokenizer:
    """A fast tokenizer with one chat template, in the place of transformers' own."""

    facts: TokenizerFacts
    backend_tokenizer: tokenizers.Tokenizer
    """made when it is first used (`LazyBackend`)"""
    text_encoder: TextEncoder
    load: Callable[[], PreTrainedTokenizerBase]
    """loads it by transformers"""
    is_fast: bool = field(default=True, init=False)

    @property
    def chat_template(self) -> str:
        return self.facts.chat_template

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return dict(self.facts.special_tokens_map)

    @property
    def chat_control_tokens(self) -> Sequence[str] | None:
        return self.facts.chat_control_tokens

    @property
    def bos_token_id(self) -> int | None:
        return self.facts.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self.facts.eos_token_id

    @property
    def bos_token(self) -> str | None:
        return self.facts.special_tokens_map.get("bos_token")

    @cached_property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {
            number: AddedToken(content, special)
            for number, content, special in self.facts.added_tokens
        }

    @cached_property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {content: number for number, content, _ in sorted(self.facts.added_tokens)}

    @property
    def largest_id(self) -> int:
        """The largest id of any token."""
        proof = self.text_encoder.proof
        if proof is None:
            return max(self.get_vocab().values())
        return max(int(proof.token_ids.max()), *self.added_tokens_decoder)

    def get_vocab(self) -> dict[str, int]:
        """Return every token and its id."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """Return a token as the vocabulary writes it."""
        added = self.added_tokens_decoder.get(token)
        return added.content if added else self.backend_tokenizer.id_to_token(token)

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Return the text of [tokens]; it is never tidied."""
        assert not clean_up_tokenization_spaces, "decoded text is shown as it is"
        ids = [int(token) for token in token_ids]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Return the ids of a text, under the name that transformers gives them."""
        encoding = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoding.ids}

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        sanitize_control_tokens: bool = False,
        **variables: Any,  # as transformers names them: the template's
    ) -> Any:
        """Return the text of a conversation, or its ids: what transformers' method gives.

        Raises:
            Exception: whatever the template raises.
        """
        assert not return_dict, "ids alone, or the text"
        if sanitize_control_tokens:
            return self.load().apply_chat_template(
                list(conversation),
                tools=tools,
                tokenize=tokenize,
                return_dict=False,
                add_generation_prompt=add_generation_prompt,
                sanitize_control_tokens=True,
                **variables,
            )
        text = served_text(
            self.chat_template,
            conversation,
            tools,
            {**self.facts.special_tokens_map, **variables},
            add_generation_prompt=add_generation_prompt,
        )
        return self(text, add_special_tokens=False)["input_ids"] if tokenize else text


class LazyBackend:
    """A tokenizer of `tokenizers` that is made when it is first used: that takes 0.3 seconds.

    Args:
        definition: as `Tokenizer.to_str` gives it, UTF-8.
    """

    def __init__(self, definition: bytes) -> None:
        self._definition = definition
        self._made: tokenizers.Tokenizer | None = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend(), name)

    def _backend(self) -> tokenizers.Tokenizer:
        if self._made is None:
            with self._lock:
                if self._made is None:  # no other thread was quicker
                    self._made = tokenizers.Tokenizer.from_buffer(self._definition)
                    self._definition = b""
                    free_memory.give_back()
        return self._made


def own_arguments(tokenizer: PreTrainedTokenizerBase | CarriedTokenizer) -> frozenset[str]:
    """Return the names that transformers takes for arguments of its own, beside a row's."""
    if isinstance(tokenizer, CarriedTokenizer):
        return frozenset(tokenizer.facts.own_arguments)
    return frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
