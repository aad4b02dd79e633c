"""The ids of a tokenizer against the rows of a model's embedding, before anything is started."""

from __future__ import annotations

import heapq

from miles.data.config import EncodeConfig
from miles.data.encoding import kept_encoders
from miles.data.tokens.carried_tokenizer import CarriedTokenizer
from miles.data.tokens.load import load_tokenizer
from miles.errors import ConfigError

NUM_NAMED = 3
"""Tokens that the error names, at most."""


def require_ids_fit(config: EncodeConfig, vocab_size: int, model: str) -> None:
    """Refuse a tokenizer that can produce an id for which the embedding has no row.

    Added and special tokens count: a row may spell each of them. Rows of padding do not count.

    Args:
        config: names the tokenizer.
        vocab_size: `vocab_size` in the config.json of the model.
        model: folder of the model, for the error.

    Raises:
        ConfigError: names the tokens with the largest ids, the vocabulary's size and what to do.
        TemplateError: the tokenizer cannot be loaded.
    """
    tokenizer = kept_encoders.known_tokenizer(config) or load_tokenizer(config)
    if isinstance(tokenizer, CarriedTokenizer) and tokenizer.largest_id < vocab_size:
        return
    ids = tokenizer.get_vocab()
    beyond = {token: number for token, number in ids.items() if number >= vocab_size}
    if not beyond:
        return

    largest = heapq.nlargest(NUM_NAMED, beyond, key=lambda token: beyond[token])
    named = ", ".join(f"{token!r} is {beyond[token]}" for token in largest)
    num_rows = max(beyond.values()) + 1
    raise ConfigError(
        f"{config.tokenizer}: {len(beyond)} of the tokenizer's {len(ids)} tokens have no row in "
        f"the embedding: {named}; vocab_size in {model}/config.json is {vocab_size}, so that ids "
        f"go up to {vocab_size - 1}. Take the tokenizer that belongs to this model, or give the "
        f"model {num_rows} rows: model.resize_token_embeddings({num_rows}) and "
        "model.save_pretrained in transformers; a converted checkpoint is then converted anew"
    )
