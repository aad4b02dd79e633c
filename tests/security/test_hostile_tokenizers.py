"""A tokenizer's folder of a stranger: nothing in it runs, waits, or leads elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from miles.cli import main
from miles.data.config import EncodeConfig
from miles.data.tokens import load
from miles.data.tokens.load import load_tokenizer
from miles.errors import TemplateError
from tests.support.fault_table import NOTHING, observed

CODE = """
from pathlib import Path
Path(__file__).with_name("RAN").write_text("")
import os
Path(os.environ["MARK"]).write_text("")
from transformers import PreTrainedTokenizerFast as Mine
from transformers import PretrainedConfig as MineConfig
"""


@pytest.fixture
def folder(tmp_path: Path, chatml_tokenizer_folder: Path) -> Path:
    """A copy of the small tokenizer, to be spoilt."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(chatml_tokenizer_folder, copy)
    return copy


def change(file: Path, **settings: Any) -> None:
    """Add settings to a JSON file."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | settings))


def remote_tokenizer(folder: Path) -> None:
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
        tokenizer_class="Mine",
    )


def remote_config(folder: Path) -> None:
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "mine.MineConfig", "AutoTokenizer": ["mine.Mine", "mine.Mine"]},
        model_type="mine",
        tokenizer_class="Mine",
    )


def remote_repository(folder: Path) -> None:
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["someone/else--mine.Mine", None]},
    )


def remote_processor(folder: Path) -> None:
    change(folder / "processor_config.json", auto_map={"AutoProcessor": "mine.Mine"})
    change(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "mine.Mine"})
    change(folder / "generation_config.json", auto_map={"AutoModel": "mine.Mine"})


@pytest.mark.parametrize(
    "spoil", [remote_tokenizer, remote_config, remote_repository, remote_processor]
)
def test_code_in_the_folder_never_runs(
    spoil: Callable[[Path], None],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not by `certify`, which loads it as every command does; it is refused, or loads without."""
    monkeypatch.setenv("MARK", str(tmp_path / "RAN"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "mine.py").write_text(CODE)
    spoil(folder)
    status = main(["certify", str(folder)])
    assert status in (0, 3)
    assert not list(tmp_path.rglob("RAN"))
    if spoil is remote_tokenizer:
        printed = capsys.readouterr().err
        observed("tokenizer that brings code", printed, "--trust-remote-code", NOTHING)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_pipe_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(TemplateError, match=f"{name}: a pipe or a device: refused"):
        load_tokenizer(EncodeConfig(str(folder)))


def test_a_device_is_not_read(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").symlink_to("/dev/zero")
    with pytest.raises(TemplateError, match=r"special_tokens_map\.json: a pipe or a device"):
        load_tokenizer(EncodeConfig(str(folder)))


def test_five_gigabytes_are_not_read(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 5 << 30)  # a hole: it takes no room on the disk
    with pytest.raises(TemplateError) as caught:
        load_tokenizer(EncodeConfig(str(folder)))
    observed("tokenizer file of gigabytes", str(caught.value), "bytes: refused", NOTHING)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_link_to_another_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the text of a private key")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "key")
    with pytest.raises(TemplateError, match=f"{name}: leads out of the folder") as caught:
        load_tokenizer(EncodeConfig(str(folder)))
    assert "private" not in str(caught.value)
    if "additional" not in name:
        observed("tokenizer file that leads elsewhere", str(caught.value), "leads out", NOTHING)


def test_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--a--b"
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cached / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_tokenizer(EncodeConfig(str(snapshot))).chat_template


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[" * 200_000, "{", "", "[]", '{"a": ' + "9" * 5_000 + "}"])
def test_broken_files_are_refused_or_harmless(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with contextlib.suppress(TemplateError):
        load_tokenizer(EncodeConfig(str(folder), chat_template="x"))


def test_names_of_a_remote_folder_stay_in_the_copy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing of a hostile server may hold any path; only its last part names the copy."""
    written: list[Path] = []

    def copied(url: str, target: Path, *_: Any) -> None:
        written.append(target)
        shutil.copy(folder / target.name, target)

    monkeypatch.setattr(load.storage, "copy_file", copied)
    load._from_store("memory://x", ["/x/../../tokenizer.json", "/etc/tokenizer_config.json"], False)
    assert [path.name for path in written] == ["tokenizer.json", "tokenizer_config.json"]
    assert len({path.parent for path in written}) == 1
