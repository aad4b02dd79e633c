"""Tokenizers whose ids keep the text, and those that lose some of it."""

from pathlib import Path

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.tokens.round_trip import composes, find_loss
from miles.errors import TemplateError
from tests.support.kinds_of_tokenizers import KEEPING, LOSING, save_for_chat


@pytest.mark.parametrize("kind", KEEPING)
def test_a_tokenizer_that_keeps_text_is_certified(kind: str, tmp_path: Path) -> None:
    folder = save_for_chat(KEEPING[kind](), tmp_path)
    certificate = Encoder.from_config(EncodeConfig(str(folder))).certificate
    assert certificate.composes == (kind == "Qwen")
    form = " (in NFC)" if kind == "Qwen" else ""
    assert dict(certificate.lines())["text"] == f"the ids decode to it on every probe{form}"


@pytest.mark.parametrize("kind", LOSING)
def test_a_tokenizer_that_loses_text_is_refused(kind: str, tmp_path: Path) -> None:
    make, lost = LOSING[kind]
    folder = save_for_chat(make(), tmp_path)
    with pytest.raises(TemplateError) as refused:
        Encoder.from_config(EncodeConfig(str(folder)))
    message = str(refused.value)
    assert message.startswith(f"{folder}: the tokenizer does not keep its text: {lost}: the ids of")
    assert "\n" not in message


def test_the_difference_is_shown() -> None:
    make, _ = LOSING["Strip"]
    assert str(find_loss(make())) == (
        "blanks and newlines are lost: the ids of 'the end.  ' decode to 'the end.'"
    )


def test_tidied_decoding_is_no_loss(chatml_tokenizer) -> None:
    chatml_tokenizer.clean_up_tokenization_spaces = True
    assert find_loss(chatml_tokenizer.backend_tokenizer) is None
    assert composes(chatml_tokenizer.backend_tokenizer)
