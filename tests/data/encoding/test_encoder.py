import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder, encode
from miles.data.rows.normalize import normalize
from miles.data.types import Conversation, RowRejected
from tests.support.conversations import trained_text

QUESTION = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}


def encoder_of(folder: Path | str, **settings_: Any) -> Encoder:
    return Encoder.from_config(EncodeConfig(tokenizer=str(folder), **settings_))


def conversation(
    *messages: dict[str, Any], trained: tuple[bool | None, ...] | None = None
) -> Conversation:
    return Conversation(messages, None, trained or (None,) * len(messages))


def test_ids_and_mask_of_one_turn(chatml_tokenizer) -> None:
    encoded = encode([QUESTION, ANSWER], chatml_tokenizer)
    assert encoded.input_ids.dtype == np.int32
    assert encoded.loss_mask.dtype == np.uint8
    assert encoded.input_ids.tolist() == chatml_tokenizer.apply_chat_template(
        [QUESTION, ANSWER], tokenize=True, return_dict=False
    )
    newline = chatml_tokenizer.encode("\n")[0]
    answer = chatml_tokenizer.encode("It is 4.<|im_end|>")
    assert encoded.input_ids.tolist()[-len(answer) - 1 :] == [*answer, newline]
    assert encoded.loss_mask.tolist() == [0] * (len(encoded.input_ids) - len(answer) - 1) + [
        1
    ] * len(answer) + [0]


def test_an_empty_think_block_is_masked_or_trained(chatml_tokenizer) -> None:
    assert trained_text(chatml_tokenizer, encode([QUESTION, ANSWER], chatml_tokenizer)) == [
        "It is 4.<|im_end|>"
    ]
    trained = encode([QUESTION, ANSWER], chatml_tokenizer, empty_think="train")
    assert trained_text(chatml_tokenizer, trained) == ["<think>\n\n</think>\n\nIt is 4.<|im_end|>"]


def test_what_the_generation_prompt_supplies_is_never_trained(chatml_tokenizer) -> None:
    encoded = encode(
        [QUESTION, ANSWER],
        chatml_tokenizer,
        empty_think="train",
        template_kwargs={"enable_thinking": False},
    )
    assert trained_text(chatml_tokenizer, encoded) == ["It is 4.<|im_end|>"]


def test_reasoning_is_trained(chatml_tokenizer) -> None:
    encoded = encode([QUESTION, {**ANSWER, "reasoning_content": "Add."}], chatml_tokenizer)
    assert trained_text(chatml_tokenizer, encoded) == [
        "<think>\nAdd.\n</think>\n\nIt is 4.<|im_end|>"
    ]


def test_which_turns(chatml_tokenizer, chatml_tokenizer_folder: Path) -> None:
    messages = [QUESTION, {**ANSWER, "content": "one"}, QUESTION, {**ANSWER, "content": "two"}]
    one = "one<|im_end|>"
    two = "two<|im_end|>"
    assert trained_text(chatml_tokenizer, encode(messages, chatml_tokenizer)) == [one, two]
    assert trained_text(chatml_tokenizer, encode(messages, chatml_tokenizer, turns="last")) == [two]

    def trained(turns: str, *flags: bool) -> list[str]:
        encoder = encoder_of(chatml_tokenizer_folder, turns=turns)
        return trained_text(
            chatml_tokenizer, encoder.encode(conversation(*messages, trained=flags))
        )

    assert trained("all", False, True, False, False) == [one]
    assert trained("last", False, True, False, True) == [two]
    with pytest.raises(RowRejected, match="nothing_to_train"):
        trained(
            "last", False, True, False, False
        )  # a flag excludes the last turn; "last" is not "last trained"


def test_nothing_to_train(chatml_tokenizer) -> None:
    with pytest.raises(RowRejected, match="nothing_to_train"):
        encode([QUESTION], chatml_tokenizer)


def test_special_text(chatml_tokenizer) -> None:
    messages = [{"role": "user", "content": "a <|im_end|> b <think>"}, ANSWER]
    assert encode(
        messages, chatml_tokenizer
    ).input_ids.tolist() == chatml_tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False
    )
    with pytest.raises(RowRejected, match=r"special_text: <\|im_end\|>"):
        encode(messages, chatml_tokenizer, special_text="reject")

    messages[0]["content"] = "a <think> b"  # a token of its own, but not a special one
    encode(messages, chatml_tokenizer, special_text="reject")
    with pytest.raises(RowRejected, match="special_text"):
        encode(
            [QUESTION, ANSWER],
            chatml_tokenizer,
            special_text="reject",
            tools=[{"x": ["<|endoftext|>"]}],
        )


def test_too_long(chatml_tokenizer) -> None:
    num_tokens = len(encode([QUESTION, ANSWER], chatml_tokenizer).input_ids)
    encode([QUESTION, ANSWER], chatml_tokenizer, max_sample_tokens=num_tokens)
    with pytest.raises(
        RowRejected, match=f"too_long: {num_tokens} tokens, at most {num_tokens - 1}"
    ):
        encode([QUESTION, ANSWER], chatml_tokenizer, max_sample_tokens=num_tokens - 1)


def test_text_that_is_not_unicode(chatml_tokenizer) -> None:
    with pytest.raises(RowRejected, match="bad_message"):
        encode([{"role": "user", "content": "\ud800"}, ANSWER], chatml_tokenizer)


MERGING = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_straddling_token_is_counted_not_trained(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = MERGING
    assert (
        len(chatml_tokenizer.encode("\n\n")) == 1
    )  # the header's newline merges with the answer's
    encoded = encode([QUESTION, {"role": "assistant", "content": "\nHello"}], chatml_tokenizer)
    assert trained_text(chatml_tokenizer, encoded) == ["Hello<|im_end|>"]
    assert encoded.num_straddling_tokens == 1
    plain = encode([QUESTION, {"role": "assistant", "content": "Hello"}], chatml_tokenizer)
    assert plain.num_straddling_tokens == 0


def test_an_added_token_takes_effect(chatml_tokenizer) -> None:
    messages = [{"role": "user", "content": "a larch"}, {"role": "assistant", "content": "larch"}]
    for _ in range(2):  # the second call finds the encoder of the first
        before = encode(messages, chatml_tokenizer)
    chatml_tokenizer.add_tokens(["larch"])
    token = chatml_tokenizer.convert_tokens_to_ids("larch")
    after = encode(messages, chatml_tokenizer)
    assert token not in before.input_ids
    assert token in after.input_ids[after.loss_mask == 1]


def test_a_changed_template_takes_effect(chatml_tokenizer) -> None:
    assert trained_text(chatml_tokenizer, encode([QUESTION, ANSWER], chatml_tokenizer)) == [
        "It is 4.<|im_end|>"
    ]
    chatml_tokenizer.chat_template = MERGING.replace("<|im_end|>", "<|endoftext|>")
    after = encode([QUESTION, ANSWER], chatml_tokenizer)
    assert trained_text(chatml_tokenizer, after) == ["It is 4.<|endoftext|>"]
    assert after.input_ids.tolist() == chatml_tokenizer.apply_chat_template(
        [QUESTION, ANSWER], tokenize=True, return_dict=False
    )


def test_tools_that_are_not_certified_are_rejected(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = MERGING.replace(
        "'<|im_end|>\n'", "'<|im_end|>\n' ~ (m.tool_calls or '')"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    with pytest.raises(RowRejected, match="unlocatable_turn: tool calls"):
        encode([QUESTION, {**ANSWER, "tool_calls": [call]}], chatml_tokenizer)
    encode([QUESTION, ANSWER], chatml_tokenizer)


@pytest.mark.parametrize(
    ("settings", "fingerprint"),
    [
        ({}, "3c8729f5b528224926c9c4d6abb52809"),
        ({"turns": "last"}, "8ecf5f83d6ec964037d1067cac44ae6c"),
        (
            {"special_text": "escape", "too_long": "truncate_end"},
            "6cf40d7e637ac9552fb78db83f8976de",
        ),
        ({"template_kwargs": {"enable_thinking": False}}, "2094061fee8d6cf5586f0c7809e5fa4d"),
        ({"max_sample_tokens": 512, "empty_think": "train"}, "dce02fda843077c48a229eab077a234b"),
    ],
)
def test_runs_of_earlier_releases_may_go_on(
    chatml_tokenizer_folder: Path, settings: dict[str, Any], fingerprint: str
) -> None:
    """The fingerprints are those of the first encoder, which encoded a row at a time."""
    config = EncodeConfig(str(chatml_tokenizer_folder), **settings)
    assert Encoder.from_config(config).fingerprint == fingerprint


def test_the_fingerprint_is_the_certificates(chatml_tokenizer_folder: Path) -> None:
    first, second = (encoder_of(chatml_tokenizer_folder, turns=turns) for turns in ("all", "last"))
    assert first.fingerprint == first.certificate.fingerprint != second.fingerprint


PIECES = (
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<think>",
        "</think>",
        "<tool_response>",
        "|",
        "<",
        "_",
    ),
    *(
        "\n",
        "\n\n",
        " ",
        "\t",
        "4",
        "word",
        " the",
        "é",
        "e\u0301",
        "法",
        "👩‍👩‍👧",
        "\ufdd0",
        "|\ufdd0",
    ),
)
content = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("".join)
messages_ = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]), "content": content}
    ),
    max_size=5,
)


@pytest.fixture(scope="module")
def kept_encoder(chatml_tokenizer_folder: Path) -> Encoder:
    """One encoder for all rows, as a loader has it: it keeps the programs of earlier rows."""
    return encoder_of(chatml_tokenizer_folder, empty_answer="train")


@settings(max_examples=150, deadline=None)
@given(first=messages_, answer=content)
def test_any_row_has_transformers_ids(
    kept_encoder: Encoder, first: list[dict[str, Any]], answer: str
) -> None:
    encoder = kept_encoder
    messages = [*first, {"role": "assistant", "content": answer}]
    encoded = encoder.encode(conversation(*messages))
    tokenizer = encoder.tokenizer
    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False
    )
    ends = np.flatnonzero((encoded.loss_mask[:-1] == 1) & (encoded.loss_mask[1:] == 0))
    assert len(ends) == sum(m["role"] == "assistant" for m in messages)
    assert all(encoded.input_ids[ends] == encoder.certificate.terminator_ids[0])
    assert encoded.loss_mask[0] == 0


def qwen3_answers(messages: Any) -> str:
    """Return all answers, with terminators, as Qwen3's template renders them without reasoning."""
    answers = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        is_last = position == len(messages) - 1
        answer = message["content"].lstrip("\n") if is_last else message["content"]
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            answer += "\n" * bool(answer)
            spelled = f'{{"name": "{function["name"]}", "arguments": {arguments}}}'
            answer += f"<tool_call>\n{spelled}\n</tool_call>"
        answers += answer + "<|im_end|>"
    return answers


@pytest.mark.parametrize(
    ("file", "every"), [("openhermes_sample.parquet", 120), ("glaive_tools_en.parquet", 3)]
)
def test_real_rows(file: str, every: int, assets: Path) -> None:
    encoder = encoder_of(assets / "qwen3-tokenizer", max_sample_tokens=32_768)
    tokenizer = encoder.tokenizer
    rows = pq.read_table(assets / "data" / file).to_pylist()[::every]
    for row in rows:
        row_conversation = normalize(json.dumps(row).encode())
        encoded = encoder.encode(row_conversation)

        assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(
            list(row_conversation.messages),
            tools=row_conversation.tools and list(row_conversation.tools),
            tokenize=True,
            return_dict=False,
        )

        decoded = tokenizer.decode(encoded.input_ids[encoded.loss_mask == 1])
        normal = tokenizer.backend_tokenizer.normalizer.normalize_str
        assert decoded == normal(qwen3_answers(row_conversation.messages))
    assert len(rows) >= 100


def test_the_backend_gives_what_transformers_gives(assets: Path) -> None:
    tokenizer = encoder_of(assets / "qwen3-tokenizer").tokenizer
    texts = [
        "",
        " a",
        "e\u0301 | <|im_end|>\n\n\n  x",
        "1234567890 法国 👩‍👩‍👧",
        "<think>\n\n</think>\n\nif x:\n\t\treturn",
    ]
    for text in texts:
        direct = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert direct == tokenizer(text, add_special_tokens=False)["input_ids"]
