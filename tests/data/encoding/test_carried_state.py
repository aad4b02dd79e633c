"""An encoder that was carried as bytes: the same certificate, the same rows, and no transformers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding import carried_state
from miles.data.encoding.encoder import Encoder
from miles.data.template.certify import certify
from miles.data.tokens import carried_tokenizer, load
from miles.data.types import Conversation, Encoded, RowRejected
from tests.support.chatml import CHATML
from tests.support.kinds_of_tokenizers import KEEPING, save_for_chat

VOICE = CHATML.replace(
    "{{- '<|im_start|>assistant\n' }}", "{{- '<|im_start|>assistant\n' + (voice or '') }}"
)
"""The generation prompt holds the text of a variable."""
DATED = "{{- '<|im_start|>system\n' + strftime_now('%d %b') + '<|im_end|>\n' }}" + CHATML

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def row(*contents: str, text: str | None = None, **variables: Any) -> Conversation:
    messages = tuple(
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(contents)
    )
    return Conversation(messages, None, (None,) * len(messages), text, variables)


CALLING = Conversation(
    (
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Add."},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ),
    ({"type": "function", "function": {"name": "add"}},),
    (None,) * 4,
)
ROWS = (
    row("2+2?", "4"),
    row("e\u0301 \u1100\u1161\u11a8 法国", "👩‍👩‍👧 \u212b\n\n"),
    row("2+2?", "<think>\nHm.\n</think>\n\n4", "3+3?", "6"),
    row("say <|im_end|>", "<|im_start|>assistant\nno<|im_end|>"),
    row("2+2?", "<|im_end|>"),
    row("2+2?", ""),
    row("2+2?", "\ud800"),
    row("2+2?", "4 " * 200),
    row("2+2?", "4", enable_thinking=False, voice="Aye. "),
    row("2+2?", "4", voice="Oh"),
    row("2+2?", "4", tokenize=False),
    row(text="A larch.<|im_end|>\n"),
    row(text="A <|im_start|> larch."),
    CALLING,
)


def carried(encoder: Encoder) -> Encoder:
    """Return an encoder that was packed and rebuilt."""
    state = carried_state.pack(encoder)
    assert state is not None
    load._pinned.clear()  # as in another process
    rebuilt = carried_state.unpack(state, encoder.config)
    assert rebuilt is not None
    return rebuilt


def outcomes(encoder: Encoder, rows: Sequence[Conversation]) -> list[Any]:
    found: list[Any] = []
    for outcome in encoder.encode_all(rows):
        if isinstance(outcome, RowRejected):
            found.append((outcome.reason, outcome.detail))
        else:
            assert isinstance(outcome, Encoded)
            found.append((outcome.input_ids.tolist(), outcome.loss_mask.tolist()))
    return [*found, *map(encoder.unused_keys, rows)]


@pytest.mark.parametrize("settings", [{}, {"special_text": "escape"}, {"special_text": "reject"}])
@pytest.mark.parametrize("template", [None, VOICE, DATED], ids=["chatml", "voice", "dated"])
def test_a_carried_encoder_is_the_same(
    chatml_tokenizer_folder: Path, template: str | None, settings: dict[str, Any]
) -> None:
    config = EncodeConfig(str(chatml_tokenizer_folder), template, max_sample_tokens=300, **settings)
    encoder = Encoder.from_config(config)
    rebuilt = carried(encoder)
    assert rebuilt.certificate == encoder.certificate
    assert certify(rebuilt.tokenizer, config) == encoder.certificate
    assert outcomes(rebuilt, ROWS) == outcomes(encoder, ROWS)


@pytest.mark.parametrize("kind", KEEPING)
def test_each_kind_of_tokenizer_is_carried(kind: str, tmp_path: Path) -> None:
    folder = save_for_chat(KEEPING[kind](), tmp_path / "tokenizer")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    encoder = Encoder.from_config(EncodeConfig(str(folder)))
    rebuilt = carried(encoder)
    certificate = encoder.certificate
    assert certify(rebuilt.tokenizer, rebuilt.config, certificate.fingerprint) == certificate
    (folder / "generation_config.json").unlink()  # a loader's node need not have the folder
    assert outcomes(rebuilt, ROWS) == outcomes(encoder, ROWS)
    ids = encoder.encode(ROWS[0]).input_ids
    assert rebuilt.tokenizer.decode(ids) == encoder.tokenizer.decode(ids)
    assert rebuilt.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()


def test_a_rebuilt_encoder_needs_no_transformers(
    chatml_tokenizer_folder: Path, tmp_path: Path
) -> None:
    encoder = Encoder.from_config(EncodeConfig(str(chatml_tokenizer_folder)))
    state = carried_state.pack(encoder)
    assert state is not None
    (tmp_path / "state").write_bytes(state)
    program = (
        "import pathlib, sys\n"
        "from miles.data.config import EncodeConfig\n"
        "from miles.data.encoding import carried_state\n"
        "from miles.data.types import Conversation\n"
        f"config = EncodeConfig({encoder.config.tokenizer!r})\n"
        f"state = pathlib.Path({str(tmp_path / 'state')!r}).read_bytes()\n"
        "encoder = carried_state.unpack(state, config)\n"
        "messages = ({'role': 'user', 'content': 'e\u0301'}, {'role': 'assistant', 'content': '4'})\n"
        "for variables in ({}, {'enable_thinking': False}):\n"
        "    row = Conversation(messages, None, (None, None), None, variables)\n"
        "    print(encoder.encode(row).input_ids.tolist())\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *ids, imported = other.stdout.splitlines()
    assert imported == "[]", other.stderr
    rows = [row("e\u0301", "4"), row("e\u0301", "4", enable_thinking=False)]
    assert [json.loads(line) for line in ids] == [
        encoder.encode(conversation).input_ids.tolist() for conversation in rows
    ]


# What is not carried


def test_a_state_of_others_is_not_used(
    chatml_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.from_config(EncodeConfig(str(chatml_tokenizer_folder)))
    state = carried_state.pack(encoder)
    assert state is not None
    assert carried_state.unpack(state, replace(encoder.config, turns="last")) is None
    for name in carried_state.versions():
        other = {**carried_state.versions(), name: "another"}
        monkeypatch.setattr(carried_state, "versions", lambda other=other: other)
        assert carried_state.unpack(state, encoder.config) is None
        monkeypatch.undo()
    assert carried_state.unpack(state, encoder.config) is not None


def test_a_state_holds_no_pickle(chatml_tokenizer_folder: Path) -> None:
    state = carried_state.pack(Encoder.from_config(EncodeConfig(str(chatml_tokenizer_folder))))
    assert state is not None
    arrays = np.load(io.BytesIO(state), allow_pickle=False)
    assert {str(arrays[name].dtype) for name in arrays} == {"uint8", "int32"}


@pytest.mark.parametrize("module", [carried_state, carried_tokenizer])
def test_what_transformers_renders_otherwise_is_not_carried(
    chatml_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    encoder = Encoder.from_config(EncodeConfig(str(chatml_tokenizer_folder)))
    real = module.served_text
    monkeypatch.setattr(module, "served_text", lambda *given, **more: real(*given, **more) + " ")
    assert carried_state.pack(encoder) is None


def test_a_tokenizer_of_its_own_kind_is_not_carried(
    chatml_tokenizer, chatml_tokenizer_folder: Path
) -> None:
    class Own(type(chatml_tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, *given: Any, **more: Any) -> Any:
            return super().apply_chat_template(*given, **more)

    config = EncodeConfig(str(chatml_tokenizer_folder))
    encoder = Encoder(chatml_tokenizer, config, certify(chatml_tokenizer, config))
    assert carried_state.pack(encoder) is not None
    trusting = replace(encoder, config=replace(config, trust_remote_code=True))
    assert carried_state.pack(trusting) is None
    chatml_tokenizer.__class__ = Own
    assert carried_state.pack(encoder) is None
