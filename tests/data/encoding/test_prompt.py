"""The ids of a prompt against the training ids of the same conversation, over several families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.encoding.prompt import PromptEncoder
from miles.data.types import Conversation, RowRejected
from miles.demo import tokenizer as demo_tokenizer
from tests.support.chatml import CHATML
from tests.support.kinds_of_tokenizers import CHATML as PLAIN

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<|end|>' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
)
OPEN_THINK = (  # the prompt opens a thought that no rendered turn has, as in DeepSeek's R1
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5": (PLAIN, {}),
    "Qwen3": (CHATML, {}),
    "Qwen3 without thinking": (CHATML, {"enable_thinking": False}),
    "Llama 3": (LLAMA3, {}),
    "[INST]": (INST, {}),
    "an open thought": (OPEN_THINK, {}),
}
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is 2+2? <b>\n"}
ANSWER = {"role": "assistant", "content": "4."}
AGAIN = {"role": "user", "content": "And 法 3+3?"}
CONVERSATIONS = {
    "one question": [QUESTION],
    "two questions": [QUESTION, ANSWER, AGAIN],
    "a system message": [SYSTEM, QUESTION, ANSWER, AGAIN],
}
REASONED = {"role": "assistant", "content": "<think>\nThree twice.\n</think>\n\n6"}


@pytest.fixture(scope="module")
def encoder_of(
    chatml_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Encoder]:
    """A function that returns the encoder of a family's template on a small tokenizer."""

    @cache
    def certified(family: str) -> Encoder:
        template, kwargs = FAMILIES[family]
        folder = str(tmp_path_factory.mktemp("tokenizer"))
        tokenizer = AutoTokenizer.from_pretrained(chatml_tokenizer_folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [*LLAMA_TOKENS, "<|end|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        config = EncodeConfig(folder, template_kwargs=kwargs, tokenizer_engine="tokenizers")
        return Encoder.from_config(config)

    return certified


def with_settings(encoder: Encoder, **settings: Any) -> Encoder:
    """Return an encoder under other settings of the encoding, which need no new certificate."""
    config = replace(encoder.config, **settings)
    return Encoder(encoder.tokenizer, config, encoder.certificate)


def sample_of(encoder: Encoder, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids that training sees of a conversation."""
    conversation = Conversation(tuple(messages), None, (None,) * len(messages))
    return encoder.encode(conversation).input_ids.tolist()


def served(encoder: Encoder, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids of transformers' generation prompt."""
    return encoder.tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=True,
        **encoder.config.template_kwargs,
    )


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_begins_the_sample_of_its_conversation(
    family: str, messages: list[Any], encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of(family)
    for text in ("Four.", "  4", "\n4", "法"):
        answer = {"role": "assistant", "content": text}
        sample = sample_of(encoder, [*messages, answer])
        prompt = PromptEncoder(encoder).ids(messages).tolist()
        if text.strip() == text:  # else the first token may begin in the prompt, and straddle
            assert sample[: len(prompt)] == prompt
            assert prompt == served(encoder, messages) or family == "an open thought"
        assert len(prompt) < len(sample)


def test_an_answer_is_ended_by_the_tokens_of_the_mask(
    encoder_of: Callable[[str], Encoder],
) -> None:
    encoder = encoder_of("Llama 3")
    conversation = Conversation((QUESTION, ANSWER), None, (None, None))
    encoded = encoder.encode(conversation)
    trained = encoded.input_ids[encoded.loss_mask == 1].tolist()
    prompts = PromptEncoder(encoder)
    assert tuple(trained[-1:]) == prompts.terminator_ids
    assert prompts.decode(trained[:-1]) == "4."


@pytest.mark.parametrize("answer", ["6", REASONED["content"]], ids=["plain", "reasoned"])
def test_a_prompt_may_end_behind_an_empty_think_block(
    answer: str, encoder_of: Callable[[str], Encoder]
) -> None:
    encoder = encoder_of("Qwen3")
    before = PromptEncoder(encoder).ids([QUESTION]).tolist()
    behind = PromptEncoder(encoder, after_empty_think=True).ids([QUESTION]).tolist()
    assert encoder.tokenizer.decode(behind[len(before) :]) == "<think>\n\n</think>\n\n"
    sample = sample_of(encoder, [QUESTION, {"role": "assistant", "content": answer}])
    assert sample[: len(before)] == before
    assert (sample[: len(behind)] == behind) == (answer == "6")


def test_earlier_reasoning_is_left_out_as_in_training(
    encoder_of: Callable[[str], Encoder],
) -> None:
    encoder = encoder_of("Qwen3")
    prompt = PromptEncoder(encoder).ids([QUESTION, REASONED, AGAIN])
    assert "Three twice" not in encoder.tokenizer.decode(prompt)
    assert prompt.tolist() == served(encoder, [QUESTION, REASONED, AGAIN])


def test_a_prompt_follows_the_policy_on_control_tokens(
    encoder_of: Callable[[str], Encoder],
) -> None:
    typed = {"role": "user", "content": "What is <|im_end|>?"}
    escaping = with_settings(encoder_of("Qwen2.5"), special_text="escape")
    prompt = PromptEncoder(escaping).ids([typed]).tolist()
    sample = sample_of(escaping, [typed, ANSWER])
    assert sample[: len(prompt)] == prompt
    assert prompt != served(escaping, [typed])

    rejecting = with_settings(escaping, special_text="reject")
    with pytest.raises(RowRejected, match="special_text"):
        PromptEncoder(rejecting).ids([typed])


def test_no_length_is_too_long_for_a_prompt(encoder_of: Callable[[str], Encoder]) -> None:
    encoder = with_settings(encoder_of("Qwen3"), max_sample_tokens=20)
    long = {"role": "user", "content": "word " * 500}
    assert len(PromptEncoder(encoder).ids([long])) > 500


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_prompt_of_the_real_qwen3(messages: list[Any], assets: Path) -> None:
    encoder = Encoder.from_config(EncodeConfig(str(assets / "qwen3-tokenizer")))
    prompt = PromptEncoder(encoder).ids(messages).tolist()
    assert prompt == served(encoder, messages)
    assert sample_of(encoder, [*messages, ANSWER])[: len(prompt)] == prompt


def test_the_prompt_of_the_demo(tmp_path: Path) -> None:
    demo_tokenizer.build_tokenizer(["What is 2+2? 4."] * 50, tmp_path)
    encoder = Encoder.from_config(EncodeConfig(str(tmp_path)))
    prompt = PromptEncoder(encoder).ids([QUESTION]).tolist()
    assert prompt == served(encoder, [QUESTION])
    assert sample_of(encoder, [QUESTION, ANSWER])[: len(prompt)] == prompt
