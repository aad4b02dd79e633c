"""Folders of a checkpoint that lie about sizes, nest without end, or wait; and text that is shown."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from miles.architecture.adapter import AdapterShape
from miles.architecture.families import read_shape
from miles.cli import main
from miles.common.safe_pickle import require_plain
from miles.common.screen import Screen, printable
from miles.convert.companions import write_companions
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.peft_adapter import read_adapter
from miles.convert.safetensors_files import Weights
from miles.errors import CheckpointError
from miles.train.driver.run_log import RunLog
from tests.support.adapters import save_as_run
from tests.support.fault_table import NOTHING, observed
from tests.support.models import make_hf

DEEP = "[" * 200_000


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_hf(tmp_path / "hf", "qwen3", tied=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 10**400),
        ("num_hidden_layers", -1),
        ("hidden_size", 0),
        ("vocab_size", 1 << 40),
        ("num_attention_heads", True),
        ("num_hidden_layers", "9" * 5000),
        ("num_hidden_layers", 1e999),
        ("head_dim", 1 << 50),
    ],
)
def test_sizes_that_no_model_has_are_refused(setting: str, value: Any, hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(CheckpointError, match=r"config\.json: ") as caught:
        read_shape(str(hf))
    if value == 10**9:
        observed("config.json with absurd numbers", str(caught.value), "would be", NOTHING)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_nesting_and_pipes_are_refused(name: str, hf: Path) -> None:
    def read() -> None:
        read_shape(str(hf))
        Weights(str(hf))

    (hf / name).write_text(DEEP)
    with pytest.raises(
        CheckpointError, match=f"{name}: not (JSON that is read: nested|an index of)"
    ):
        read()
    (hf / name).unlink()
    os.mkfifo(hf / name)
    with pytest.raises(CheckpointError, match=f"{name}: a pipe or a device: refused"):
        read()


def test_a_pipe_is_not_exported(hf: Path, tmp_path: Path) -> None:
    os.mkfifo(hf / "tokenizer.json")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a pipe or a device: refused"):
        write_companions(str(hf), tmp_path / "out")


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 90_000_000),
        struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_safetensors_headers_that_lie(header: bytes, hf: Path) -> None:
    (hf / "model.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        Weights(str(hf))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter_that_wait_or_lead_out(name: str, adapter: Path, hf: Path) -> None:
    path = adapter / name
    path.rename(adapter.parent / "elsewhere")
    path.symlink_to(adapter.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} leads out of the folder: refused"):
        read_adapter(str(adapter), read_shape(str(hf)))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"{name}: (a pipe or a device|not a safet)"):
        read_adapter(str(adapter), read_shape(str(hf)))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("adapter_config.json", DEEP.encode(), "nested too deeply"),
        ("adapter_config.json", b"[]", "a JSON object was expected; found list"),
        ("adapter_config.json", b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
        ("adapter_config.json", None, "refused. Files of this kind have a few megabytes"),
        ("adapter_model.safetensors", struct.pack("<Q", 1 << 62), "its header would have"),
        ("adapter_model.safetensors", struct.pack("<Q", 2) + b"[]", "not a safetensors header"),
    ],
)
def test_an_adapter_that_lies(
    name: str, content: bytes | None, found: str, adapter: Path, hf: Path
) -> None:
    (adapter / name).write_bytes(content or b"")
    if content is None:  # a huge file of holes
        os.truncate(adapter / name, 1 << 40)
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        read_adapter(str(adapter), read_shape(str(hf)))
    assert found in str(caught.value)


@pytest.fixture
def adapter(hf: Path, tmp_path: Path) -> Path:
    """A folder in PEFT's format."""
    save_as_run(hf, tmp_path / "run", AdapterShape(4, 8.0, ("q_proj",)))
    return Path(megatron_to_hf(str(tmp_path / "run"), str(hf), str(tmp_path / "adapter")))


@pytest.mark.parametrize("shape", [[1 << 62], [1 << 31, 1 << 31], [-1], [1.5], ["1"], [10**400]])
def test_shapes_that_lie_allocate_nothing(shape: list[Any], hf: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (hf / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        Weights(str(hf))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a/b", "", 7, "pipe"])
def test_places_outside_are_refused(name: Any, tmp_path: Path) -> None:
    """Also where Megatron reads the checkpoint: it would open whatever the name leads to."""
    os.mkfifo(tmp_path / "pipe")
    stored = {MetadataIndex("decoder.x"): _StorageInfo(name, 0, 1)}
    metadata = Metadata({}, planner_data=None, storage_data=stored)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"there: tensor decoder\.x: .*refused"):
        require_plain(tmp_path, "there")


# What is shown of a stranger's text

HOSTILE = "a\x1b[2J\x1b]0;owned\x07b\x9b31mc\u202etxt\r\x00"
SHOWN = "a␛[2J␛]0;owned␇b\ufffd31mc\ufffdtxt␍␀"


def test_control_codes_are_shown_as_pictures() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("plain\ttext\n世界 \u200f") == "plain\ttext\n世界 \u200f"


def test_no_screen_of_ours_is_controlled(tmp_path: Path) -> None:
    file = io.StringIO()
    screen = Screen(file=file, width=200, markup=False, force_terminal=True)
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    screen.print(table)
    screen.print(HOSTILE, soft_wrap=True)
    screen.rule(HOSTILE)
    with RunLog(str(tmp_path), screen) as log:
        log.report(HOSTILE + "\n2026-01-01 00:00:00Z  all is well")
    plain = Console(file=io.StringIO(), width=200)
    assert isinstance(screen, type(plain))
    for code in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\x00"):
        assert code not in file.getvalue()
    first, second = (tmp_path / "train.log").read_text().splitlines()
    assert SHOWN in first
    assert second.startswith("    2026"), "no line of another hand begins with a time"


def test_a_hostile_name_does_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "-rf \x1b[2J\nmiles: done").touch()
    assert main(["certify", str(tmp_path)]) == 3
    printed = capsys.readouterr().err
    assert "\x1b[2J" not in printed
    assert len(printed.splitlines()) == 1
    assert "␛[2J" in printed


def test_torch_was_not_told_otherwise() -> None:
    """`weights_only` where nothing is said is torch's own default, unless the environment differs."""
    assert torch.serialization._default_to_weights_only(None)
