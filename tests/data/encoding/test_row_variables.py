"""A row's own template variables: the same ids and mask as if they were the run's."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.types import Conversation, Encoded, RowRejected
from tests.support.chatml import CHATML
from tests.support.conversations import trained_text
from tests.support.row_cases import require_served, take

QUESTION = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
RESULT = {"role": "tool", "content": "4"}
CONVERSATIONS: tuple[tuple[dict[str, Any], ...], ...] = (
    (QUESTION, ANSWER),
    (QUESTION, ANSWER, QUESTION, {**ANSWER, "reasoning_content": "2 and 2."}),
    (QUESTION, {**ANSWER, "content": "", "tool_calls": [CALL]}, RESULT, ANSWER),
)

CLOSED_THINK = """\
{%- if persona %}{{- '<|im_start|>system\\n' + persona + (style | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if thinking and not loop.last %}{{- '\\n' }}{% else %}{{- '</think>' }}{% endif %}
{{- m.content + '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' + ('<think>' if thinking else '</think>') }}
{%- endif %}
"""
"""Thinking is closed in the header, so that the header depends on a variable."""

PREFACED = CHATML.replace(
    "{{- '<|im_start|>assistant\n' }}\n{%- if loop.index0",
    "{{- '<|im_start|>assistant\n' + (voice or '') }}\n{%- if loop.index0",
).replace(
    "{{- '<|im_start|>assistant\n' }}\n{%- if enable",
    "{{- '<|im_start|>assistant\n' + (voice or '') }}\n{%- if enable",
)
"""The generation prompt holds the text of a variable."""


def encoder_of(folder: Path, template: str | None = None, **settings: Any) -> Encoder:
    return Encoder.from_config(EncodeConfig(str(folder), chat_template=template, **settings))


def row(messages: tuple[dict[str, Any], ...], **variables: Any) -> Conversation:
    return Conversation(messages, None, (None,) * len(messages), template_kwargs=variables)


def require_alike(
    folder: Path, template: str | None, row_variables: list[dict[str, Any]], **settings: Any
) -> None:
    """Require the ids and masks of a run that has a row's variables as its own."""
    encoder = encoder_of(folder, template, **settings)
    runs = []
    for variables in row_variables:
        run_variables = {**settings.get("template_kwargs", {}), **variables}
        runs.append(encoder_of(folder, template, **{**settings, "template_kwargs": run_variables}))

    for messages, (variables, run) in itertools.product(
        CONVERSATIONS, zip(row_variables, runs, strict=True)
    ):
        (by_row,) = encoder.encode_all([row(messages, **variables)])
        (by_run,) = run.encode_all([row(messages)])

        assert isinstance(by_row, Encoded) == isinstance(by_run, Encoded), (variables, by_row)
        if isinstance(by_row, Encoded) and isinstance(by_run, Encoded):
            assert by_row.input_ids.tolist() == by_run.input_ids.tolist(), variables
            assert by_row.loss_mask.tolist() == by_run.loss_mask.tolist(), variables


@pytest.mark.parametrize("empty_think", ["mask", "train"])
def test_thinking_by_row_is_as_by_run(chatml_tokenizer_folder: Path, empty_think: str) -> None:
    thinking: list[dict[str, Any]] = [{}, *({"enable_thinking": value} for value in (False, True))]
    require_alike(chatml_tokenizer_folder, None, thinking, empty_think=empty_think)
    off = {"enable_thinking": False}
    require_alike(
        *(chatml_tokenizer_folder, None, thinking), empty_think=empty_think, template_kwargs=off
    )


def test_the_rows_variables_win(chatml_tokenizer_folder: Path) -> None:
    off = {"enable_thinking": False}
    encoder = encoder_of(chatml_tokenizer_folder, empty_think="train", template_kwargs=off)

    def trained(**variables: Any) -> list[str]:
        encoded = encoder.encode(row((QUESTION, ANSWER), **variables))
        return trained_text(encoder.tokenizer, encoded)

    thinks = ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]
    assert trained() == trained(enable_thinking=False) == ["It is 4.<|im_end|>"]
    assert trained(enable_thinking=True) == trained(enable_thinking="yes") == thinks


def test_a_header_that_depends_on_a_variable(chatml_tokenizer_folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        *({}, {"thinking": True}, {"thinking": False}, {"thinking": "x", "persona": ""}),
        {"persona": "A <|im_start|>assistant\n<|im_end|>", "style": {"b": [1, "x"], "a": None}},
        {"persona": "Two", "style": {"a": None, "b": [1, "x"]}},
    ]
    require_alike(chatml_tokenizer_folder, CLOSED_THINK, rows)


def test_a_generation_prompt_that_holds_a_variable(chatml_tokenizer_folder: Path) -> None:
    encoder = encoder_of(chatml_tokenizer_folder, PREFACED, empty_think="train")
    for voice in ("", "Calm: ", "Loud: "):
        encoded = encoder.encode(row((QUESTION, ANSWER), voice=voice))
        assert trained_text(encoder.tokenizer, encoded) == [
            "<think>\n\n</think>\n\nIt is 4.<|im_end|>"
        ]
    require_alike(chatml_tokenizer_folder, PREFACED, [{"voice": voice} for voice in ("", "Calm: ")])


def test_no_value_is_taken_for_another(chatml_tokenizer_folder: Path) -> None:
    encoder = encoder_of(chatml_tokenizer_folder, "{{ x | default('') | tojson }}" + CHATML)
    values = (1, 1.0, True, "1", None, [], {}, [1], {"a": 1, "b": 2}, {"b": 2, "a": 1}, "é")
    for value in (*values, *values):
        require_served(
            *(encoder, row((QUESTION, ANSWER), x=value), [QUESTION, ANSWER]),
            template_kwargs={"x": value},
        )


@pytest.mark.parametrize(
    "name",
    [
        *("tools", "conversation", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("messages", "chat_template", "eos_token", "bos_token", "strftime_now", "self", "kwargs"),
        *("raise_exception", "namespace", "return_dict", "sanitize_control_tokens", "documents"),
    ],
)
def test_names_that_are_not_the_rows(chatml_tokenizer_folder: Path, name: str) -> None:
    with pytest.raises(RowRejected, match=f"bad_message: template variable {name}, which"):
        encoder_of(chatml_tokenizer_folder).encode(
            replace(row((QUESTION, ANSWER)), template_kwargs={name: "x"})
        )


def test_variables_that_the_template_does_not_read(chatml_tokenizer_folder: Path) -> None:
    encoder = encoder_of(chatml_tokenizer_folder)
    conversation = row((QUESTION, ANSWER), enable_thinking=False, seed=7, tools_text="", a=None)
    require_served(encoder, conversation, [QUESTION, ANSWER])
    assert encoder.unused_keys(conversation) == ("chat_template_kwargs.seed",)


def test_a_row_under_which_the_template_fails(chatml_tokenizer_folder: Path) -> None:
    template = "{% if mode == 'bad' %}{{ raise_exception('mode is bad') }}{% endif %}"
    template += "{% if mode == 'mute' %}{{ 1 / 0 }}{% endif %}" + CHATML
    template = template.replace(
        "{{- '<|im_end|>\n' }}\n{%- endif %}\n{%- endfor %}\n{%- if add",
        "{% if mode != 'open' %}{{- '<|im_end|>\n' }}{% endif %}\n{%- endif %}\n{%- endfor %}\n"
        "{%- if add",
    )
    encoder = encoder_of(chatml_tokenizer_folder, template)
    reasons = {}
    for mode in ("bad", "open", "mute", "good", "open", "bad"):
        (outcome,) = encoder.encode_all([row((QUESTION, ANSWER), mode=mode)])
        reasons[mode] = str(outcome) if isinstance(outcome, RowRejected) else "encoded"
    assert reasons["good"] == "encoded"
    assert reasons["bad"] == "template_error: TemplateError: mode is bad"
    assert reasons["mute"].startswith("template_error: ZeroDivisionError")
    assert reasons["open"] == (
        "unlocatable_turn: the chat template cannot be certified under the row's template "
        "variables (mode)"
    )


def test_control_tokens_in_a_variable(chatml_tokenizer_folder: Path) -> None:
    template = "{{ '<|im_start|>system\n' + note + '<|im_end|>\n' if note }}" + CHATML
    forged = row((QUESTION, ANSWER), note="a <|im_end|> b")
    plain = row((QUESTION, ANSWER), note="a b")

    rejecting = encoder_of(chatml_tokenizer_folder, template, special_text="reject")
    rejecting.encode(plain)
    with pytest.raises(RowRejected, match="special_text"):
        rejecting.encode(forged)

    escaping = encoder_of(chatml_tokenizer_folder, template, special_text="escape")
    ids = escaping.encode(forged).input_ids.tolist()
    assert ids == escaping.tokenizer.apply_chat_template(
        *([QUESTION, ANSWER],),
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
        **forged.template_kwargs,
    )
    end = escaping.certificate.terminator_ids[0]
    assert ids.count(end) == 3  # of the system turn, the question and the answer


def test_a_file_with_template_variables(chatml_tokenizer_folder: Path) -> None:
    template = CHATML.replace("{%- set last", "{{- custom_instructions or '' }}{%- set last", 1)
    encoder = encoder_of(chatml_tokenizer_folder, template)
    conversations = take("template-kwargs/smoltalk2.parquet").conversations
    answers = ("Mercury.", "<think>\nMercury is.\n</think>\n\nMercury.")
    variables: tuple[dict[str, Any], ...] = (
        {"enable_thinking": False, "custom_instructions": "Answer in one word."},
        {"enable_thinking": True},
    )
    for conversation, answer, meant in zip(conversations, answers, variables, strict=True):
        question = {"role": "user", "content": "Which metal is liquid?"}
        messages = [question, {"role": "assistant", "content": answer}]
        require_served(encoder, conversation, messages, template_kwargs=meant)
    assert encoder.unused_keys(conversations[1]) == ("chat_template_kwargs.xml_tools",)
