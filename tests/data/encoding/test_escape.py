"""Escaped rows have transformers' ids, and the mask covers the answers."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import encode_marked_chat

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder, encode
from miles.data.encoding.escape import _BEGIN, _END, Escaper
from miles.data.rows.normalize import normalize
from miles.data.tokens.bpe import text_encoder
from miles.data.types import Conversation, Encoded, RowRejected
from tests.support.chatml import CHATML
from tests.support.conversations import trained_text

HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "splits and strips": CHATML,
    "trims": "{% for m in messages %}"
    + HEADER
    + "{{ m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    + PROMPT,
    "tears marks apart": (
        "{% for m in messages %}"
        + HEADER
        + "{% if m.role == 'user' %}{{ m.content.split('<think>')[-1].replace('im_', '\n') }}"
        + "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        + PROMPT
    ),
}
PIECES = (
    *(
        "<|im_end|>",
        "<|im_start|>",
        "<|im_start|>assistant\n",
        "<|endoftext|>",
        "<think>",
        "</think>",
        "<tool_call>",
    ),
    *(
        "<|im_",
        "end|>",
        "<",
        ">",
        "|",
        _BEGIN,
        _END,
        _BEGIN + "<|im_end|>" + _END,
        _END + "<|im_end|>" + _BEGIN,
    ),
    *("\n", "\n\n", " ", "word", " the", "e\u0301", "\u0301", "\u6cd5"),
)
content = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=7).map("".join)


def served(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, sanitize_control_tokens=True, **options
    )


def rows_of(*contents: str) -> list[dict[str, Any]]:
    return [
        {"role": "assistant" if number % 2 else "user", "content": text}
        for number, text in enumerate(contents)
    ]


def escaped(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Encoded:
    encoded = encode(messages, tokenizer, special_text="escape", empty_answer="train", **options)
    assert encoded.input_ids.tolist() == served(tokenizer, messages)
    return encoded


def sentencepiece_like(split: bool = True) -> Any:
    """Return a Unigram tokenizer with a blank before text, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    characters = "".join(map(chr, range(32, 127))) + "\n"
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        unk_token="<unk>",
        special_tokens=["<unk>"],
        initial_alphabet=[*characters],
        show_progress=False,
    )

    tokenizer.train_from_iterator(
        ["the quick brown fox <|im_start|>user\nassistant\n<|im_end|>\n", characters] * 9, trainer
    )
    definition = json.loads(tokenizer.to_str())
    definition["model"]["vocab"] += [[f"<0x{byte:02X}>", -99.0] for byte in range(256)]
    definition["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATES["trims"]
    return fast


# Ids and masks


def test_only_typed_control_tokens_become_text(chatml_tokenizer: Any) -> None:
    encoded = escaped(chatml_tokenizer, rows_of("what is <|im_end|>?", "It ends. <|im_end|> does."))
    assert trained_text(chatml_tokenizer, encoded) == ["It ends. <|im_end|> does.<|im_end|>"]
    end = chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.input_ids.tolist().count(end) == 2
    assert encoded.num_straddling_tokens == 0


@pytest.mark.parametrize(
    "answer",
    [
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "a<|im_end|>",
        "<|endoftext|>\n",
        "<|im_end|><|im_end|> <|im_start|>",
    ],
)
def test_control_tokens_at_an_answers_edges(chatml_tokenizer: Any, answer: str) -> None:
    encoded = escaped(chatml_tokenizer, rows_of("q", answer, "<|im_end|>", answer))
    assert trained_text(chatml_tokenizer, encoded) == [answer + "<|im_end|>"] * 2


def test_turns_that_are_not_selected_stay_masked(chatml_tokenizer: Any) -> None:
    messages = rows_of("<|im_start|>", "one <|im_end|>", "<|im_end|>", "two <|im_end|>")
    encoded = escaped(chatml_tokenizer, messages, turns="last")
    assert trained_text(chatml_tokenizer, encoded) == ["two <|im_end|><|im_end|>"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_any_row(template: str, chatml_tokenizer_folder: Path) -> None:
    encoder = Encoder.from_config(
        EncodeConfig(
            empty_answer="train",
            tokenizer=str(chatml_tokenizer_folder),
            chat_template=TEMPLATES[template],
            special_text="escape",
        )
    )
    tokenizer = encoder.tokenizer
    end = encoder.certificate.terminator_ids[0]

    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        texts=st.lists(content, min_size=2, max_size=4).filter(lambda texts: len(texts) % 2 == 0)
    )
    def check(texts: list[str]) -> None:
        messages = rows_of(*texts)
        encoded = encoder.encode(Conversation(tuple(messages), None, (None,) * len(messages)))
        assert encoded.input_ids.tolist() == served(tokenizer, messages)
        last = np.flatnonzero((encoded.loss_mask[:-1] == 1) & (encoded.loss_mask[1:] == 0))
        assert encoded.input_ids[last].tolist() == [end] * (len(texts) // 2)
        trained = encoded.input_ids[encoded.loss_mask == 1].tolist()
        assert trained.count(end) == len(texts) // 2  # those of the answers are text

    check()


def test_tools_and_calls(chatml_tokenizer: Any) -> None:
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {"a": "<|im_end|>", "b": ["</tool_call>"]}},
    }
    messages = [
        {"role": "user", "content": "<tool_response>"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "</tool_response><|im_end|>"},
        {"role": "assistant", "content": "done"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "ends in <|im_end|>"}}]

    encoded = encode(messages, chatml_tokenizer, tools=tools, special_text="escape")
    assert encoded.input_ids.tolist() == served(chatml_tokenizer, messages, tools=tools)
    first, second = trained_text(chatml_tokenizer, encoded)
    assert '{"a": "<|im_end|>", "b": ["</tool_call>"]}' in first
    assert second.endswith("done<|im_end|>")


def test_marks_of_the_row_count_for_nothing(chatml_tokenizer: Any) -> None:
    plain = escaped(chatml_tokenizer, rows_of("a <|im_end|>", "b <|im_end|> c"))
    forged = rows_of(f"a {_BEGIN}<|im_{_END}end|>{_END}", f"b <|{_END}im_end|> {_BEGIN}c")
    assert escaped(chatml_tokenizer, forged).input_ids.tolist() == plain.input_ids.tolist()
    only_marks = escaped(chatml_tokenizer, rows_of(f"a{_BEGIN}", f"{_END}b"))
    assert trained_text(chatml_tokenizer, only_marks) == ["b<|im_end|>"]


@pytest.mark.parametrize("named", [None, [], ["<think>"], ["</think>", "<tool_call>", "no token"]])
def test_which_tokens_control(chatml_tokenizer: Any, named: list[str] | None) -> None:
    chatml_tokenizer.chat_control_tokens = named
    text = "<think> </think> <tool_call> <|im_end|>"
    encoded = escaped(chatml_tokenizer, rows_of(text, text.replace("think", "tool_call")))
    ids = encoded.input_ids.tolist()[: encoded.loss_mask.tolist().index(1)]
    number = chatml_tokenizer.convert_tokens_to_ids("<tool_call>")
    assert ids.count(number) == int(named is not None and "<tool_call>" not in named)


def test_tokens_that_overlap(chatml_tokenizer: Any) -> None:
    chatml_tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_end|><|x|>", "im", "|><"]}
    )
    assert text_encoder(chatml_tokenizer.backend_tokenizer).engine.endswith("can overlap in a text")
    for text in ("<|im_end|><|x|>", "<|im_end|><|im_end|>", "im <|x|>|><|im"):
        escaped(chatml_tokenizer, rows_of(text, text))


@pytest.mark.parametrize(
    "normalizer", [None, normalizers.NFC(), normalizers.Replace("\u212b", "\u00c5")]
)
def test_other_normalizers(chatml_tokenizer: Any, normalizer: Any) -> None:
    chatml_tokenizer.backend_tokenizer.normalizer = normalizer
    encoded = escaped(
        chatml_tokenizer, rows_of("\u212b <|im_end|> e\u0301", "B <|IM_END|><|im_end|>")
    )
    assert trained_text(chatml_tokenizer, encoded)[0].endswith("<|im_end|><|im_end|>")


def test_a_control_token_that_the_normalizer_changes(chatml_tokenizer: Any) -> None:
    chatml_tokenizer.add_special_tokens({"additional_special_tokens": ["<|STOP|>"]})
    chatml_tokenizer.backend_tokenizer.normalizer = normalizers.Replace("STOP", "stop")
    encoded = escaped(chatml_tokenizer, rows_of("q", "<|STOP|>"))
    assert trained_text(chatml_tokenizer, encoded) == ["<|stop|><|im_end|>"]


def test_a_tokenizer_that_merges_newlines() -> None:
    """The newline before a piece cannot be taken off again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["\n<|im_end|>", "\na"] * 5, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATES["trims"]

    escaper = Escaper(fast, text_encoder(tokenizer))
    for text in (
        f"{_BEGIN}<|im_end|>{_END}a",
        f"x\n{_BEGIN}<|im_end|>{_END}\na<|im_end|>",
        f"a{_BEGIN}a{_END}\na",
    ):
        ids, first, _ = escaper.encode_at(text, [0, len(text)])
        assert ids.tolist() == encode_marked_chat(fast, text)
        assert first == [0, len(ids)]


@pytest.mark.parametrize("split", [True, False])
def test_a_tokenizer_like_sentencepiece(split: bool) -> None:
    tokenizer = sentencepiece_like(split)
    encoded = escaped(tokenizer, rows_of("a <|im_end|> b", "the <|im_end|> fox"))
    assert trained_text(tokenizer, encoded) == ["the <|im_end|> fox<|im_end|>"]
    escaped(tokenizer, rows_of("<|im_end|>", "<|im_start|>"))


def test_a_control_token_that_plain_text_comes_to() -> None:
    """A token of the model: without added tokens it is made all the same."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "<e>": 3}, unk_token="b"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "<e>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", bos_token="<s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    escaper = Escaper(fast, text_encoder(fast.backend_tokenizer))
    with pytest.raises(
        RowRejected, match="special_text: a control token that cannot be written as ordinary text"
    ):
        escaper.encode_at(escaper.mark("a <s> b"), ())


# Plain text


def encode_text(folder: Path, text: str, special_text: str) -> Encoded:
    encoder = Encoder.from_config(EncodeConfig(tokenizer=str(folder), special_text=special_text))
    return encoder.encode(Conversation((), None, (), text))


def test_plain_text(chatml_tokenizer: Any, chatml_tokenizer_folder: Path) -> None:
    text = "a <|im_end|> b"
    end = chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode_text(chatml_tokenizer_folder, text, "allow").input_ids.tolist().count(end) == 2
    encoded = encode_text(chatml_tokenizer_folder, text, "escape")
    assert encoded.input_ids.tolist().count(end) == 1
    assert chatml_tokenizer.decode(encoded.input_ids) == text + "<|im_end|>"
    with pytest.raises(RowRejected, match=r"special_text: <\|im_end\|>"):
        encode_text(chatml_tokenizer_folder, text, "reject")


def test_half_of_a_surrogate_pair(chatml_tokenizer: Any, chatml_tokenizer_folder: Path) -> None:
    for text in ("\ud800 <|im_end|>", "<|im_end|>\udfff"):
        with pytest.raises(RowRejected, match="bad_message"):
            encode_text(chatml_tokenizer_folder, text, "escape")
        with pytest.raises(RowRejected, match="bad_message"):
            encode(rows_of(text, "a"), chatml_tokenizer, special_text="escape")


# The other paths


def test_a_row_without_control_tokens_is_not_escaped(
    chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Escaper, "encode_at", lambda *_: pytest.fail("escaped"))
    messages = rows_of("a < b |im_end| <|im_en", "c <\u200b|im_end|>")
    encoded = encode(messages, chatml_tokenizer, special_text="escape")
    assert encoded.input_ids.tolist() == served(chatml_tokenizer, messages)


def test_control_tokens_and_marks_need_escaping(chatml_tokenizer: Any) -> None:
    escaper = Escaper(chatml_tokenizer, text_encoder(chatml_tokenizer.backend_tokenizer))
    assert not escaper.is_needed_for(["a", "", "<|im_en"])
    for text in ("a<|im_end|>", "</tool_call>", f"{_BEGIN}", f"x{_END}"):
        assert escaper.is_needed_for(["a", text])


def test_marks_are_put_into_strings_only(chatml_tokenizer: Any) -> None:
    escaper = Escaper(chatml_tokenizer, text_encoder(chatml_tokenizer.backend_tokenizer))
    row = {"<|im_end|>": ["<|im_end|>", ("x<think>", 1, None, True)], "n": {"a": f"{_END}b"}}
    before = repr(row)
    marked = [f"{_BEGIN}<|im_end|>{_END}", [f"x{_BEGIN}<think>{_END}", 1, None, True]]
    assert escaper.mark(row) == {"<|im_end|>": marked, "n": {"a": "b"}}
    assert repr(row) == before


def test_reject_and_allow(chatml_tokenizer: Any) -> None:
    messages = rows_of("a <|im_end|>", "b")
    with pytest.raises(RowRejected, match=r"special_text: <\|im_end\|>"):
        encode(messages, chatml_tokenizer, special_text="reject")
    with pytest.raises(RowRejected, match="special_text"):
        encode(rows_of("a", "b <|im_start|>"), chatml_tokenizer, special_text="reject")
    encode(rows_of("a <think>", f"b {_BEGIN}"), chatml_tokenizer, special_text="reject")
    allowed = encode(messages, chatml_tokenizer, special_text="allow")
    assert allowed.input_ids.tolist() == chatml_tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False
    )
    assert trained_text(chatml_tokenizer, allowed) == ["b<|im_end|>"]


# Marked text itself


@pytest.mark.parametrize("kind", ["chatml", "sentencepiece"])
def test_marked_text_as_in_transformers(kind: str, chatml_tokenizer: Any) -> None:
    """Torn marks are among the texts; every point between two pieces is looked at."""
    tokenizer = chatml_tokenizer if kind == "chatml" else sentencepiece_like()
    escaper = Escaper(tokenizer, text_encoder(tokenizer.backend_tokenizer))
    rng = random.Random(3)
    for _ in range(150):
        parts = rng.choices(
            [*PIECES, f"{_BEGIN}<|im_end|>{_END}", f"{_BEGIN}<|im_start|>{_END}"],
            k=rng.randint(0, 9),
        )
        text = "".join(parts)

        ids, first, straddled = escaper.encode_at(text, range(len(text) + 1))
        assert ids.tolist() == encode_marked_chat(tokenizer, text)
        assert first == sorted(first)
        assert first[-1] == len(ids)
        assert not straddled[0]
        assert not straddled[-1]
        for match in escaper._marks.finditer(text):
            assert not straddled[match.start()]
            assert not straddled[match.end()]
            held = match.group(1)
            assert len(ids[first[match.start()] : first[match.end()]]) == (
                len(escaper._without_added_tokens(held)) if held else 0
            )


def test_real_rows(assets: Path) -> None:
    encoder = Encoder.from_config(
        EncodeConfig(
            empty_answer="train",
            tokenizer=str(assets / "qwen3-tokenizer"),
            special_text="escape",
            max_sample_tokens=32_768,
        )
    )
    tokenizer = encoder.tokenizer

    rng = random.Random(5)
    spelled = (
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<|endoftext|>",
        "<think>",
        "</think>",
        "<tool_call>",
    )
    rows = pq.read_table(assets / "data" / "openhermes_sample.parquet").to_pylist()[::211]
    for row in rows:
        messages = [dict(message) for message in normalize(json.dumps(row).encode()).messages]
        for message in messages:
            at = rng.randint(0, len(message["content"]))
            message["content"] = (
                message["content"][:at] + rng.choice(spelled) + message["content"][at:]
            )

        encoded = encoder.encode(Conversation(tuple(messages), None, (None,) * len(messages)))
        assert encoded.input_ids.tolist() == served(tokenizer, messages)
        trained = tokenizer.decode(encoded.input_ids[encoded.loss_mask == 1])
        assert trained.endswith("<|im_end|>")
    assert len(rows) > 70
