"""Megatron -> Hugging Face: the requested files, all beside the weights, nothing of a user lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from miles.cli import main
from miles.common.checkpoint_folder import CHAT_TEMPLATE, EXTRA
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.errors import CheckpointError
from tests.support.models import make_hf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_hf(folder / "hf", "qwen3", tied=False)
    hf_to_megatron(str(folder / "hf"), str(folder / "megatron"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Both formats, for a test to change."""
    return shutil.copytree(made, tmp_path / "made")


def export(folder: Path, **options: Any) -> Path:
    megatron_to_hf(str(folder / "megatron"), str(folder / "hf"), str(folder / "back"), **options)
    return folder / "back"


def test_files_of_the_requested_size(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = load_file(folder / "hf/model.safetensors")
    back = export(folder, max_shard_bytes=100_000)
    files = sorted(back.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) == 8
    found: dict[str, torch.Tensor] = {}
    index = json.loads((back / "model.safetensors.index.json").read_text())
    for file in files:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 100_000
        assert {name for name, of in index["weight_map"].items() if of == file.name} == set(held)
        found |= held
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)  # reads the index
    assert torch.equal(model.state_dict()["lm_head.weight"], whole["lm_head.weight"])

    # What came in such files goes back into them, unless other sizes are asked for.
    hf_to_megatron(str(back), str(folder / "megatron"))
    megatron_to_hf(str(folder / "megatron"), str(back), str(folder / "again"))
    for file in back.iterdir():
        assert (folder / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    megatron_to_hf(
        str(folder / "megatron"), str(back), str(folder / "again"), max_shard_bytes=10**9
    )
    assert [file.name for file in (folder / "again").glob("model*")] == ["model.safetensors"]


def test_the_index_is_as_transformers_writes_it(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model.save_pretrained(folder / "theirs", max_shard_size="100KB")
    hf_to_megatron(str(folder / "theirs"), str(folder / "megatron"))
    megatron_to_hf(str(folder / "megatron"), str(folder / "theirs"), str(folder / "back"))
    for file in (folder / "theirs").iterdir():
        assert (folder / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_everything_beside_the_weights_comes_along(folder: Path) -> None:
    beside = {
        "tokenizer.json": "{}",
        "generation_config.json": '{"eos_token_id": 3}',
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "vocab.txt": "",
        "LICENSE": "free",
    }
    for name, content in beside.items():
        (folder / "hf" / name).parent.mkdir(exist_ok=True)
        (folder / "hf" / name).write_text(content)
    for name in (
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "model.gguf",
        ".cache/x",
        "tf_model.h5",
    ):
        (folder / "hf" / name).parent.mkdir(exist_ok=True)
        (folder / "hf" / name).write_text("weights, or hidden")
    back = export(folder)
    found = {str(path.relative_to(back)) for path in back.rglob("*") if path.is_file()}
    assert found == {*beside, "config.json", "chat_template.jinja", "model.safetensors"}
    for name in found - {"model.safetensors"}:
        assert (back / name).read_bytes() == (folder / "hf" / name).read_bytes()


def test_the_template_of_the_run_comes_along(folder: Path, capsys: Any) -> None:
    def template() -> str:
        return (export(folder) / "chat_template.jinja").read_text()

    own = (folder / "hf/chat_template.jinja").read_text()
    kept = folder / "megatron/release" / EXTRA
    kept.write_text('{"cursor": {}}')
    assert template() == own
    kept.write_text(json.dumps({"cursor": {}, CHAT_TEMPLATE: "of the run"}))
    (folder / "hf/chat_template.jinja").unlink()
    assert template() == "of the run"
    assert template() == "of the run", "what an export wrote, the next one may replace"

    (folder / "given.jinja").write_text("given")
    (folder / "broken.jinja").write_text("{{ messages")
    words = ["--load", folder / "megatron", "--hf-checkpoint", folder / "hf"]
    words += ["--save", folder / "back", "--chat-template-path", folder / "given.jinja"]
    assert main(["convert", "megatron-to-hf", *map(str, words)]) == 0
    assert (folder / "back/chat_template.jinja").read_text() == "given"

    words[-1] = folder / "broken.jinja"
    assert main(["convert", "megatron-to-hf", *map(str, words)]) == 3
    assert "broken.jinja: not a chat template that can run: Templ" in capsys.readouterr().err
    assert (folder / "back/chat_template.jinja").read_text() == "given"


def test_companion_links_that_lead_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "hf/tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json leads out of the folder: refused"):
        export(folder)
    assert not (folder / "back").exists()
    (folder / "hf/tokenizer.json").unlink()
    (folder / "hf/config.json").rename(tmp_path / "config.json")
    (folder / "hf/config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json leads out of the folder: refused"):
        export(folder)


def test_the_dtype_of_a_trained_checkpoint(folder: Path) -> None:
    """In that of the weights it came from; where they are not there, in that of config.json."""
    shutil.move(folder / "megatron/release", folder / "megatron/iter_0000005")
    (folder / "megatron/latest_checkpointed_iteration.txt").write_text("5")
    config = json.loads((folder / "hf/config.json").read_text())
    (folder / "hf/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))

    def dtypes() -> set[torch.dtype]:
        return {tensor.dtype for tensor in load_file(export(folder) / "model.safetensors").values()}

    assert dtypes() == {torch.float32}
    whole = load_file(folder / "hf/model.safetensors")
    (folder / "hf/model.safetensors").unlink()
    assert dtypes() == {torch.bfloat16}
    narrow = load_file(folder / "back/model.safetensors")
    assert all(torch.equal(narrow[name], whole[name].bfloat16()) for name in whole)


def test_another_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "hf/config.json").read_text())
    (folder / "hf/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        CheckpointError, match="num_layers is 4 in the checkpoint, 3 in the configuration"
    ):
        export(folder)
    (folder / "hf/config.json").write_text(json.dumps({**config, "vocab_size": 193}))
    with pytest.raises(
        CheckpointError,
        match="padded_vocab_size is 192 in the checkpoint, vocab_size 193 in the conf",
    ):
        export(folder)
    (folder / "megatron/latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(
        CheckpointError, match=r"megatron: no Megatron checkpoint there: latest_.*\.txt is missing"
    ):
        export(folder)
    assert not (folder / "back").exists()


def test_what_is_not_ours_is_not_removed(folder: Path) -> None:
    export(folder)
    export(folder)  # what an earlier conversion wrote is
    (folder / "back/notes.txt").write_text("mine")
    with pytest.raises(
        CheckpointError,
        match=r"back: holds notes\.txt, which no conversion of .*hf writes, and which",
    ):
        export(folder)
    assert (folder / "back/notes.txt").read_text() == "mine"
    (folder / "back/notes.txt").rename(
        folder / "back/optimizer.pt"
    )  # weights, perhaps, but none that are written
    with pytest.raises(CheckpointError, match=r"back: holds optimizer\.pt, which no conversion"):
        export(folder)
    with pytest.raises(CheckpointError, match="hf: is --hf-checkpoint itself"):
        megatron_to_hf(str(folder / "megatron"), str(folder / "hf"), str(folder / "hf/"))
    with pytest.raises(
        CheckpointError, match=r"megatron: holds latest_checkpointed_iteration\.txt, release, which"
    ):
        megatron_to_hf(str(folder / "megatron"), str(folder / "hf"), str(folder / "megatron"))
    (folder / "far").mkdir()
    (folder / "link").symlink_to(folder / "far")  # to another disk, perhaps: that is where it goes
    megatron_to_hf(str(folder / "megatron"), str(folder / "hf"), str(folder / "link"))
    assert (folder / "link").is_symlink()
    assert (folder / "far/model.safetensors").exists()
    (folder / "empty").mkdir()
    megatron_to_hf(str(folder / "megatron"), str(folder / "hf"), str(folder / "empty"))
    assert (folder / "empty/model.safetensors").exists()
