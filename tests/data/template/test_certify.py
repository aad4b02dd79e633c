from dataclasses import replace

import pytest

from miles.data.config import EncodeConfig
from miles.data.template.certify import certify
from miles.errors import TemplateError
from tests.support.fault_table import NOTHING, observed

CONFIG = EncodeConfig(tokenizer="test-tokenizer")


def test_the_certificate_of_chatml(chatml_tokenizer) -> None:
    certificate = certify(chatml_tokenizer, CONFIG)
    assert certificate.generation_prompt == certificate.turn_header == "<|im_start|>assistant\n"
    assert certificate.terminator == "<|im_end|>"
    assert certificate.terminator_ids == (chatml_tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert certificate.empty_thinks == ("<think>\n\n</think>\n\n",)
    assert certificate.has_think

    assert certificate.follows_prompt
    assert certificate.accepts_system
    assert certificate.accepts_tools
    assert certificate.bos_count == 0
    assert certificate.tool_grouping == "grouped"
    assert (certificate.renders_reasoning, certificate.drops_reasoning) == (True, True)
    assert not certificate.extends_prefix  # the empty think block goes with the next question
    assert certificate.engine.startswith(("fastokens", "tiktoken"))
    assert certificate.date == "none"


def test_a_prompt_longer_than_the_header(chatml_tokenizer) -> None:
    certificate = certify(
        chatml_tokenizer, replace(CONFIG, template_kwargs={"enable_thinking": False})
    )
    assert certificate.generation_prompt == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert certificate.turn_header == "<|im_start|>assistant\n"


PLAIN = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_without_think(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = PLAIN
    certificate = certify(chatml_tokenizer, CONFIG)
    assert not certificate.has_think


def test_bos(chatml_tokenizer) -> None:
    chatml_tokenizer.add_special_tokens({"bos_token": "<s>"})
    chatml_tokenizer.chat_template = "{{ bos_token }}" + PLAIN
    assert certify(chatml_tokenizer, CONFIG).bos_count == 1
    chatml_tokenizer.chat_template = "{{ bos_token + bos_token }}" + PLAIN
    with pytest.raises(TemplateError, match="two BOS tokens <s>"):
        certify(chatml_tokenizer, CONFIG)


def test_a_terminator_of_several_tokens(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = PLAIN.replace("<|im_end|>\n", "<|im_end|><|endoftext|>")
    certificate = certify(chatml_tokenizer, CONFIG)
    assert certificate.terminator == "<|im_end|><|endoftext|>"
    assert certificate.terminator_ids == tuple(
        chatml_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")
    )


def test_a_token_after_the_last_answer_only(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = PLAIN.replace("+ '<|im_end|>\n'", "+ '<|im_end|>'").replace(
        "{% endif %}", "{% else %}<|endoftext|>{% endif %}"
    )
    certificate = certify(chatml_tokenizer, CONFIG)
    assert certificate.terminator == "<|im_end|>"
    assert certificate.generation_prompt == "<|im_start|>assistant\n"


def test_tools_left_out_are_not_accepted(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = PLAIN
    certificate = certify(chatml_tokenizer, CONFIG)
    assert not certificate.accepts_tools
    assert certificate.tool_grouping == "none"


def test_tools_need_a_header_with_a_token(chatml_tokenizer) -> None:
    words = chatml_tokenizer.chat_template.replace("<|im_start|>", "### ")
    assert certify(chatml_tokenizer, CONFIG).accepts_tools
    chatml_tokenizer.chat_template = words
    certificate = certify(chatml_tokenizer, CONFIG)
    assert certificate.turn_header == "### assistant\n"
    assert not certificate.accepts_tools


def test_a_template_that_refuses_system_and_tools(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}" + PLAIN
    )
    certificate = certify(chatml_tokenizer, CONFIG)
    assert not certificate.accepts_system
    assert not certificate.accepts_tools


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN.split("{% if add")[0], "no generation prompt"),
        ("{{ undefined.attribute }}", "fails on a plain conversation"),
        (
            PLAIN.replace("<|im_start|>", "")
            .replace("assistant\n", "assistant ")
            .replace("+ '\n'", "+ ' '"),
            "ordinary word",
        ),
        (PLAIN.replace("<|im_end|>", ""), "does not end each assistant turn with a special token"),
        (
            PLAIN.replace("m.content +", "m.content + '</think>' +"),
            "does not end each assistant turn with a special",
        ),
        (
            PLAIN.replace(
                "m.content + '<|im_end|>",
                "m.content + ('<|endoftext|>' if loop.last else '<|im_end|>') + '",
            ),
            "different tokens",
        ),
        (
            PLAIN.replace("m.content", "m.content | lower"),
            "renders the message 'QUESTION1' 0 times",
        ),
        (
            PLAIN.replace("m.content +", "m.content + m.content +"),
            "renders the message 'QUESTION1' 2 times",
        ),
        (
            PLAIN.replace("'<|im_start|>assistant\n'", "'[model]'"),
            "is not how its assistant turns begin",
        ),
        (
            PLAIN.replace("assistant\n", "model\n"),
            "1 assistant messages; the chat template begins 2 turns",
        ),
        # the answer's own words after the terminator
        (
            PLAIN.replace("'<|im_end|>\n'", "'<|im_end|>\n' + (m.reasoning_content or '')"),
            r"the words of assistant turn 0 of a probe do not lie",
        ),
        # an assistant header without an assistant message, once there are four messages
        (
            PLAIN.replace(
                "{% if add",
                "{% if messages|length > 3 and messages[0].role == 'system' %}"
                "<|im_start|>assistant\n{% endif %}{% if add",
            ),
            "assistant turn 2 is not ended by",
        ),
        ("{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }}" + PLAIN, "takes the filter random"),
        ("{{ strftime_now(messages[0].role and '%Y') }}" + PLAIN, "today's date"),
    ],
)
def test_other_templates_are_refused(template: str, message: str, chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=message) as error:
        certify(chatml_tokenizer, CONFIG)
    assert "test-tokenizer" in str(error.value)


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
        "{% if add_generation_prompt %}{{ 10 ** (10 ** 10) }}{% endif %}",
        "{{ '%9999999999d' % 1 }}",
        # Jinja computes constants when it compiles.
        "{% if false %}{{ 10 ** (10 ** 10) }}{% endif %}",
        "{% if false %}{{ 'x' * 10 ** 10 }}{% endif %}",
        "{% if false %}{{ 'x' | center(10 ** 10) }}{% endif %}",
        "{% if false %}{{ '%9999999999d' % 1 }}{% endif %}",
        "{% if false %}{{ [1] | tojson(indent=10 ** 10) }}{% endif %}",
        "{% if false %}{{ ['x' * 2 ** 21] | join | replace('x', 'x' * 2 ** 21) }}{% endif %}",
        # Endless only with a later probe, or behind what no symbol can follow.
        "{% if messages | length > 2 %}{{ 'x' * 10 ** 10 }}{% endif %}",
        "{% set x = messages[0].content | list %}{{ 'x' * 10 ** 10 }}",
        "{% set x = messages[0].content < 'a' %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% if messages[0].tool_calls or tools %}{{ 'x' * 10 ** 10 }}{% endif %}"
        "{% if messages[1].reasoning_content %}{{ 'x' * 10 ** 10 }}{% endif %}",
    ],
)
def test_an_endless_template_is_refused(bomb: str, chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = bomb + PLAIN
    with pytest.raises(
        TemplateError, match="test-tokenizer: the chat template does not end"
    ) as caught:
        certify(chatml_tokenizer, CONFIG)
    if bomb.startswith("{% for i in range(99999) %}{% for"):
        fault = "chat template that does not end"
        observed(fault, str(caught.value), "does not end", NOTHING)


def test_a_given_date_is_accepted(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = "{{ date or strftime_now(messages[0].role and '%Y') }}" + PLAIN
    certify(chatml_tokenizer, replace(CONFIG, template_kwargs={"date": "1 Jan"}))


def test_arguments_of_transformers_are_no_variables(chatml_tokenizer) -> None:
    with pytest.raises(TemplateError, match="cannot be given tokenize"):
        certify(chatml_tokenizer, replace(CONFIG, template_kwargs={"tokenize": False}))


def test_padding_and_truncation_do_not_count(chatml_tokenizer) -> None:
    chatml_tokenizer.backend_tokenizer.enable_truncation(4)
    fingerprint = certify(chatml_tokenizer, CONFIG).fingerprint
    chatml_tokenizer.backend_tokenizer.enable_padding(length=1000)
    assert certify(chatml_tokenizer, CONFIG).fingerprint == fingerprint
    assert chatml_tokenizer.backend_tokenizer.truncation is None
    assert chatml_tokenizer.backend_tokenizer.padding is None
