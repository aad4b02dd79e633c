"""Reasoning in rows, under any of its names or in the content: served and trained as it is."""

import json
from pathlib import Path

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from tests.support.conversations import trained_text
from tests.support.row_cases import CASES, require_served, take

FILES = (
    "think-close-only/rows.jsonl",
    "reasoning-fields/reasoning.jsonl",
    "reasoning-fields/reasoning_content.jsonl",
    "reasoning-fields/thinking.jsonl",
)


@pytest.mark.parametrize("file", FILES)
def test_reasoning_is_served_as_the_row_has_it(file: str, chatml_tokenizer_folder: Path) -> None:
    encoder = Encoder.from_config(EncodeConfig(str(chatml_tokenizer_folder)))
    lines = (CASES / file).read_text().splitlines()
    for line, conversation in zip(lines, take(file).conversations, strict=True):
        messages = json.loads(line)["messages"]
        encoded = require_served(encoder, conversation, messages)
        (*_, last) = trained_text(encoder.tokenizer, encoded)
        assert last.startswith("<think>\n")
        assert last.endswith("<|im_end|>")
        assert encoder.unused_keys(conversation) == ()
