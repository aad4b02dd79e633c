"""Plain text, and text that was rendered beforehand: one BOS, one end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.types import Conversation, RowRejected
from tests.support.conversations import trained_text
from tests.support.row_cases import take

LLAMA = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
BOS, EOS, TURN_END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
LLAMA_TOKENS = (BOS, EOS, TURN_END, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer with Llama 3's special tokens, its BOS, and its two ends."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in LLAMA_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.chat_template = LLAMA
    fast.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def encoder_of(folder: Path, **settings: Any) -> Encoder:
    return Encoder.from_config(EncodeConfig(str(folder), **settings))


def shown(encoder: Encoder, text: str) -> tuple[str, list[str]]:
    """Return the decoded tokens of a text, and its runs of trained ones."""
    encoded = encoder.encode(Conversation((), None, (), text))
    assert encoded.input_ids.dtype == np.int32
    assert encoded.loss_mask.dtype == np.uint8
    return encoder.tokenizer.decode(encoded.input_ids), trained_text(encoder.tokenizer, encoded)


@pytest.mark.parametrize(
    ("text", "whole", "trained"),
    [
        ("words", f"{BOS}words{EOS}", f"words{EOS}"),
        (f"{BOS}words", f"{BOS}words{EOS}", f"words{EOS}"),
        (f"words{EOS}", f"{BOS}words{EOS}", f"words{EOS}"),
        (f"{BOS}words{TURN_END}", f"{BOS}words{TURN_END}", f"words{TURN_END}"),
        (f"{BOS}words{EOS}\n \n", f"{BOS}words{EOS}\n \n", f"words{EOS}"),
        (f"a{TURN_END}b", f"{BOS}a{TURN_END}b{EOS}", f"a{TURN_END}b{EOS}"),
        (f"a{TURN_END}b{TURN_END} ", f"{BOS}a{TURN_END}b{TURN_END} ", f"a{TURN_END}b{TURN_END}"),
        (f" {BOS}a", f"{BOS} {BOS}a{EOS}", f" {BOS}a{EOS}"),
        ("a<|eom_id|>", f"{BOS}a<|eom_id|>{EOS}", f"a<|eom_id|>{EOS}"),
    ],
)
def test_a_special_token_is_added_where_it_is_missing(
    llama_folder: Path, text: str, whole: str, trained: str
) -> None:
    assert shown(encoder_of(llama_folder), text) == (whole, [trained])


def test_a_bos_is_not_trained_where_the_tokenizer_adds_none(llama_folder: Path) -> None:
    file = llama_folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    encoder = encoder_of(llama_folder)
    assert shown(encoder, "words") == (f"words{EOS}", [f"words{EOS}"])
    assert shown(encoder, f"{BOS}words") == (f"{BOS}words{EOS}", [f"words{EOS}"])


def test_where_a_server_stops_is_an_end(llama_folder: Path) -> None:
    encoder = encoder_of(llama_folder)
    ends = [encoder.tokenizer.convert_tokens_to_ids(token) for token in (EOS, "<|eom_id|>")]
    config = llama_folder / "generation_config.json"
    for content in (json.dumps({"eos_token_id": ends}), json.dumps({"eos_token_id": ends[1]})):
        config.write_text(content)
        assert shown(encoder_of(llama_folder), "a<|eom_id|>")[0] == f"{BOS}a<|eom_id|>"
    for content in ("{", "[]", '{"eos_token_id": null}', '{"eos_token_id": "x"}', "{}"):
        config.write_text(content)
        assert shown(encoder_of(llama_folder), "a<|eom_id|>")[0] == f"{BOS}a<|eom_id|>{EOS}"


def test_markers_are_ordinary_text_where_they_are_escaped(llama_folder: Path) -> None:
    text = f"{BOS}words{EOS}"
    encoder = encoder_of(llama_folder, special_text="escape")
    encoded = encoder.encode(Conversation((), None, (), text))
    assert encoder.tokenizer.decode(encoded.input_ids) == BOS + text + EOS
    for token in (BOS, EOS):
        assert encoded.input_ids.tolist().count(encoder.tokenizer.convert_tokens_to_ids(token)) == 1
    assert encoded.loss_mask.tolist() == [0] + [1] * (len(encoded.input_ids) - 1)
    with pytest.raises(RowRejected, match="special_text"):
        encoder_of(llama_folder, special_text="reject").encode(Conversation((), None, (), text))


def test_files_of_rendered_text(llama_folder: Path, chatml_tokenizer_folder: Path) -> None:
    llama = encoder_of(llama_folder)
    rendered, plain = take("rendered-text/llama.jsonl").conversations
    assert rendered.text is not None
    assert shown(llama, rendered.text) == (rendered.text, [rendered.text.removeprefix(BOS)])
    assert shown(llama, str(plain.text)) == (f"{BOS}plain words{EOS}", [f"plain words{EOS}"])

    chatml = encoder_of(chatml_tokenizer_folder)
    bare, with_newline, plain = take("rendered-text/rendered.jsonl").conversations
    assert shown(chatml, str(bare.text)) == (bare.text, [bare.text])
    assert shown(chatml, str(with_newline.text)) == (with_newline.text, [bare.text])
    assert shown(chatml, str(plain.text))[0] == "plain words<|im_end|>"
