"""A tokenizer that can produce an id without a row in the embedding is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from miles.data.config import EncodeConfig
from miles.data.encoding import carried_state, kept_encoders
from miles.data.stream import token_ids
from miles.data.stream.token_ids import require_ids_fit
from miles.data.tokens.bpe import AUTO
from miles.data.tokens.engines import TIKTOKEN
from miles.errors import ConfigError
from tests.support.streams import demo_tokenizer

NUM_TOKENS = 2048
"""Of the demo's tokenizer."""


def test_the_largest_id_needs_a_row() -> None:
    config = EncodeConfig(str(demo_tokenizer()))
    require_ids_fit(config, NUM_TOKENS, "model")
    with pytest.raises(ConfigError, match=r"1 of the tokenizer's 2048 tokens .* is 2047; vocab_"):
        require_ids_fit(config, NUM_TOKENS - 1, "model")


def test_added_and_special_tokens_count(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_tokenizer())
    tokenizer.add_tokens(["<first>", "<second>"])
    tokenizer.add_special_tokens({"pad_token": "<third>"})
    tokenizer.save_pretrained(tmp_path)
    config = EncodeConfig(str(tmp_path))
    require_ids_fit(config, NUM_TOKENS + 3, "model")

    with pytest.raises(ConfigError) as raised:
        require_ids_fit(config, NUM_TOKENS - 1, "s3://models/tiny")
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}: 4 of the tokenizer's 2051 tokens have no row")
    assert "'<third>' is 2050, '<second>' is 2049, '<first>' is 2048;" in message
    assert (
        "vocab_size in s3://models/tiny/config.json is 2047, so that ids go up to 2046" in message
    )
    assert "resize_token_embeddings(2051)" in message


@pytest.mark.parametrize("certified", [AUTO, TIKTOKEN])
def test_a_certified_tokenizer_has_the_same_ids(certified: str) -> None:
    """Without transformers, which would be loaded for this alone."""
    config = EncodeConfig(str(demo_tokenizer()), max_sample_tokens=99)
    own = replace(config, tokenizer_engine=certified)  # few rows are encoded by tiktoken
    state = kept_encoders.state_of(own)
    assert state is not None
    encoder = carried_state.unpack(state, own)
    assert encoder is not None
    assert encoder.tokenizer.largest_id == NUM_TOKENS - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_encoders, "known", lambda asked: encoder if asked == own else None)
        patch.setattr(token_ids, "load_tokenizer", lambda config: pytest.fail("it was loaded"))
        require_ids_fit(config, NUM_TOKENS, "model")
        with pytest.raises(ConfigError, match=r"1 of the tokenizer's 2048 tokens .* is 2047;"):
            require_ids_fit(config, NUM_TOKENS - 1, "model")
