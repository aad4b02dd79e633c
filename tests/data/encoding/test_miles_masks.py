"""The examples of docs/masks.md: the mask here, and those of Miles, which renders every turn alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles.data.encoding.encoder import encode
from tests.support.chatml import CHATML
from tests.support.conversations import assistant, trained_runs, user

PAGE = Path(__file__).parents[3] / "docs/masks.md"
HEADER = "<|im_start|>assistant\n"

QWEN3 = CHATML.replace("namespace(question=-1)", "namespace(question=messages | length - 1)")
"""As Qwen3's own template: a conversation without a question has no answer to it."""


@pytest.fixture
def tokenizer(chatml_tokenizer: Any) -> Any:
    assert QWEN3 != CHATML
    chatml_tokenizer.chat_template = QWEN3
    return chatml_tokenizer


def trained_by_us(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> list[str]:
    """Return what follows the header of each assistant turn, with the trained part marked."""
    encoded = encode(messages, tokenizer, **settings)
    text, position = "", 0
    for begin, end in trained_runs(encoded):
        text += tokenizer.decode(encoded.input_ids[position:begin])
        text += f"«{tokenizer.decode(encoded.input_ids[begin:end])}»"
        position = end
    text += tokenizer.decode(encoded.input_ids[position:])
    return [turn.partition("<|im_start|>")[0] for turn in text.split(HEADER)[1:]]


def trained_by_miles(
    tokenizer: Any, messages: list[dict[str, Any]], before: list[dict[str, Any]]
) -> list[str]:
    """Return the same for a mask of Miles: all of an assistant turn but its header is trained.

    Args:
        before: what the turn is rendered after: nothing (`qwen`), or a question (`qwen3`).
    """
    turns = []
    for message in messages:
        if message["role"] == "assistant":
            text = tokenizer.apply_chat_template([*before, message], tokenize=False)
            turns.append(f"«{text.partition(HEADER)[2]}»")
    return turns


@pytest.mark.parametrize("thought", [{}, {"reasoning_content": "add"}], ids=["without", "with"])
def test_page_shows_each_mask(tokenizer: Any, thought: dict[str, str]) -> None:
    answers = [assistant("4", **thought), assistant("6", **thought)]
    messages = [user("2+2?"), answers[0], user("3+3?"), answers[1]]
    here = trained_by_us(tokenizer, messages)
    masks = {
        "template": [turn.replace("«", "").replace("»", "") for turn in here],
        "here": here,
        "qwen": trained_by_miles(tokenizer, messages, before=[]),
        "qwen3": trained_by_miles(tokenizer, messages, before=[user("?")]),
    }

    lines = [f"{name:8}  {'  ...  '.join(turns)}" for name, turns in masks.items()]
    shown = "\n".join(line.replace("\n", "\\n") for line in lines)
    assert f"```\n{shown}\n```" in PAGE.read_text(encoding="utf-8"), shown
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert all(HEADER + turn in rendered for turn in masks["template"])


def test_empty_think_block_is_trained_where_the_template_has_it(tokenizer: Any) -> None:
    messages = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    first, last = trained_by_us(tokenizer, messages, empty_think="train")
    assert first == "«4<|im_end|>»\n"
    assert last == "«<think>\n\n</think>\n\n6<|im_end|>»\n"
