"""The files beside the weights: as they are, or with the template that a run trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from miles.convert.companions import write_companions
from miles.errors import CheckpointError
from tests.support.models import require_same_files
from tests.support.streams import demo_tokenizer

TRAINED = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}ä"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A tokenizer with a template in each place where one may lie."""
    folder = shutil.copytree(demo_tokenizer(), tmp_path / "hf")
    edit_tokenizer(folder, chat_template="old", added="ü")
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("old")
    return folder


def edit_tokenizer(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_without_a_template_every_byte_stays(hf: Path, tmp_path: Path) -> None:
    write_companions(str(hf), tmp_path / "export")
    require_same_files(hf, tmp_path / "export")


def test_the_trained_template_is_the_only_one(hf: Path, tmp_path: Path) -> None:
    assert isinstance(AutoTokenizer.from_pretrained(hf).chat_template, dict)
    write_companions(str(hf), tmp_path / "export", TRAINED)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.chat_template == TRAINED
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tools=[{"name": "look"}], tokenize=False
    )
    assert text == "hi<|im_end|>\nä"

    config, original = (
        json.loads((folder / "tokenizer_config.json").read_text())
        for folder in (tmp_path / "export", hf)
    )
    assert original.pop("chat_template") == "old"
    assert config == original
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == sorted(
        path.name for path in demo_tokenizer().iterdir()
    )


def test_named_templates_make_way(hf: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "old"}]
    edit_tokenizer(hf, chat_template=named)
    (hf / "chat_template.jinja").unlink()
    write_companions(str(hf), tmp_path / "export", TRAINED)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == TRAINED


def test_a_broken_tokenizer_config_is_named(hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf/tokenizer_config\.json: not JSON"):
        write_companions(str(hf), tmp_path / "export", TRAINED)
