"""Checkpoints on object storage: staged on this machine, and uploaded, the completing file last."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from miles.common import storage
from miles.common.lease import LEASE
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.verify import verify
from miles.errors import CheckpointError
from tests.support.bars import last_bars
from tests.support.models import edit_tensors, make_hf

TRACKER = "latest_checkpointed_iteration.txt"


class Uploads(logging.Handler):
    """What the server's log says was written, in order."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def emit(self, record: logging.LogRecord) -> None:
        match = re.search(r'"PUT /\S*/(\S+) HTTP', record.getMessage())
        if match and match.group(1) != ".miles-probe":  # which asks whether one may write there
            self._names.append(f"+{match.group(1)}")


class _Names(list[str]):
    """Names in order, without those of the lease, which is renewed at any time."""

    def append(self, name: str) -> None:
        if name[1:] != LEASE:
            super().append(name)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the files and folders that are uploaded or removed, in order."""
    names = _Names()
    remove = storage.remove

    def noted(url: str) -> None:
        names.append(f"-{url.rsplit('/', 1)[-1]}")
        remove(url)

    monkeypatch.setattr(storage, "remove", noted)
    handler = Uploads(names)
    logging.getLogger("werkzeug").addHandler(handler)
    yield names
    logging.getLogger("werkzeug").removeHandler(handler)


def test_remote_there_and_back_in_order(bucket: str, tmp_path: Path, written: list[str]) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=False)
    (source / "original").mkdir()
    (source / "original/consolidated.00.pth").write_bytes(b"weights in another format")
    storage.upload_folder(source, f"{bucket}/hf")
    written.clear()

    hf_to_megatron(f"{bucket}/hf", f"{bucket}/megatron")
    assert written[-1] == f"+{TRACKER}"
    assert "+.metadata" in written
    assert not verify(str(source), f"{bucket}/megatron").differences
    written.clear()
    hf_to_megatron(
        f"{bucket}/hf", f"{bucket}/megatron"
    )  # again: until it is whole, no tracker names it
    assert written[0] == f"-{TRACKER}"
    assert written[-1] == f"+{TRACKER}"
    assert not verify(f"{bucket}/hf", f"{bucket}/megatron").differences

    written.clear()
    megatron_to_hf(f"{bucket}/megatron", f"{bucket}/hf", f"{bucket}/back")
    assert written == [
        "+chat_template.jinja",
        "+config.json",
        "+generation_config.json",
        "+model.safetensors",
    ]
    assert (
        storage.read_bytes(f"{bucket}/back/model.safetensors")
        == (source / "model.safetensors").read_bytes()
    )
    written.clear()
    megatron_to_hf(f"{bucket}/megatron", f"{bucket}/hf", f"{bucket}/back", max_shard_bytes=100_000)
    assert written[0] == "-model.safetensors", "what says that it is complete goes first"
    assert written[-1] == "+model.safetensors.index.json"
    assert "model.safetensors" not in storage.names(f"{bucket}/back")
    assert not verify(f"{bucket}/back", f"{bucket}/megatron").differences

    storage.write_text(f"{bucket}/back/notes.txt", "mine")
    with pytest.raises(CheckpointError, match=r"back: holds notes\.txt, which no conversion"):
        megatron_to_hf(f"{bucket}/megatron", f"{bucket}/hf", f"{bucket}/back")
    storage.write_text(f"{bucket}/megatron/{TRACKER}", "12")
    with pytest.raises(CheckpointError, match="holds the checkpoints of a run"):
        hf_to_megatron(f"{bucket}/hf", f"{bucket}/megatron")


def test_the_bars_count_what_is_moved(bucket: str, tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=True)
    storage.upload_folder(source, f"{bucket}/hf")
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    console = Console(file=screen, force_terminal=True, width=100, no_color=True)
    hf_to_megatron(f"{bucket}/hf", f"{bucket}/megatron", console=console)
    megatron_to_hf(f"{bucket}/megatron", f"{bucket}/hf", f"{bucket}/back", console=console)
    bars = last_bars(screen.getvalue())
    assert [bar[0] for bar in bars] == ["downloading", "converting", "uploading"] * 2
    assert all(done == num_bytes for _, done, num_bytes in bars)
    assert float(bars[0][1]) == pytest.approx(
        (source / "model.safetensors").stat().st_size / 1000, abs=0.1
    )


def test_only_what_is_needed_is_fetched(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=True)
    hf_to_megatron(str(source), str(tmp_path / "megatron"))
    (source / "original.pth").write_bytes(b"weights in another format")
    storage.upload_folder(source, f"{bucket}/hf")
    for name in ("iter_0000001", "iter_0000002"):
        storage.upload_folder(tmp_path / "megatron/release", f"{bucket}/run/{name}")
    storage.write_text(f"{bucket}/run/{TRACKER}", "2")
    fetched: list[str] = []
    copy_file = storage.copy_file

    def noted(url: str, *others: Any) -> None:
        fetched.append(url.removeprefix(bucket))
        copy_file(url, *others)

    monkeypatch.setattr(storage, "copy_file", noted)
    hf_to_megatron(f"{bucket}/hf", str(tmp_path / "again"))
    assert fetched == ["/hf/model.safetensors"]
    fetched.clear()
    megatron_to_hf(f"{bucket}/run", f"{bucket}/hf", str(tmp_path / "back"))
    files = {f"/run/iter_0000002/{file.name}" for file in (tmp_path / "megatron/release").iterdir()}
    assert set(fetched) == files | {
        "/hf/chat_template.jinja",
        "/hf/config.json",
        "/hf/generation_config.json",
    }
    assert (tmp_path / "back/model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()


def test_errors_come_before_any_upload(bucket: str, tmp_path: Path, written: list[str]) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=True)
    storage.upload_folder(source, f"{bucket}/hf")
    hf_to_megatron(f"{bucket}/hf", f"{bucket}/megatron")
    edit_tensors(source, lambda tensors: tensors.pop("model.norm.weight"))
    storage.upload_folder(source, f"{bucket}/hf")
    written.clear()
    with pytest.raises(
        CheckpointError, match=rf"{bucket}/hf: tensor model\.norm\.weight is missing"
    ):
        hf_to_megatron(f"{bucket}/hf", f"{bucket}/megatron")
    config = json.loads((source / "config.json").read_text())
    storage.write_text(f"{bucket}/hf/config.json", json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(
        CheckpointError,
        match=rf"{bucket}/megatron/release: a checkpoint of another model than {bucket}/hf",
    ):
        megatron_to_hf(f"{bucket}/megatron", f"{bucket}/hf", f"{bucket}/back")
    assert written == ["+config.json"]  # by this test
    assert storage.exists(f"{bucket}/megatron/{TRACKER}")
