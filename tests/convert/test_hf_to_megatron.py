"""Hugging Face -> Megatron: errors before anything is written, nothing left after an interruption."""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from miles import cli
from miles.common import atomic_folders
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.torch_dist import Checkpoint
from miles.convert.verify import verify
from miles.errors import CheckpointError
from miles.train.parallel_layout import Layout
from tests.support.disks import small_disk
from tests.support.models import edit_config, edit_tensors, make_hf, require_same_files
from tests.support.processes import LIMIT_SECONDS, miles_here, wait_until
from tests.support.ranks import run_ranks

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("hf") / "hf", "qwen3", tied=True)


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(made, tmp_path / "hf")


QUERIES = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERIES), rf"hf: tensor {QUERIES} is missing; config\.json asks for it"),
        (
            lambda t: t.update({"model.odd": torch.ones(1)}),
            r"model\.safetensors: config\.json does not ask for tensor model\.odd$",
        ),
        (
            lambda t: t.update({"model.odd": torch.ones(1), "model.even": torch.ones(1)}),
            r"does not ask for tensor model\.even, nor for 1 others",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"model\.safetensors: tensor model\.norm\.weight has shape \(7,\); "
            r"config\.json asks for \(64,\)",
        ),
        (
            lambda t: t.update({QUERIES: t[QUERIES].bfloat16()}),
            rf"tensor {QUERIES} is torch\.bfloat16, .*layers\.0.*q_proj\.weight torch\.float32: "
            r"Megatron keeps them",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            r"tensor lm_head\.weight differs from model\.embed_tokens\.weight, "
            r"which config\.json says it is",
        ),
    ],
    ids=["missing", "extra", "several", "shape", "dtypes", "tied"],
)
def test_a_wrong_tensor_is_refused_by_name(source: Path, change: Any, message: str) -> None:
    edit_tensors(source, change)
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(str(source), str(source.parent / "megatron"))
    assert [path.name for path in source.parent.iterdir()] == ["hf"]


def test_a_configuration_of_another_model(source: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "megatron")
    edit_config(source, num_hidden_layers=3)
    with pytest.raises(
        CheckpointError,
        match=r"does not ask for tensor model\.layers\.3\.input_layernorm\.weight, nor for",
    ):
        hf_to_megatron(str(source), target)
    edit_config(source, num_hidden_layers=5)
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.4\.input_layernorm\.weight is missing"
    ):
        hf_to_megatron(str(source), target)
    edit_config(source, num_hidden_layers=4, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing"):
        hf_to_megatron(str(source), target)
    edit_config(source, model_type="mamba")
    with pytest.raises(
        CheckpointError,
        match=r"config\.json: model_type 'mamba' is not one of llama, qwen2, qwen3,",
    ):
        hf_to_megatron(str(source), target)
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: no such file"):
        hf_to_megatron(str(tmp_path / "nowhere"), target)


def test_a_tied_model_that_stores_its_output_layer_alone(source: Path, tmp_path: Path) -> None:
    """transformers loads it, too. It comes back under the name that it had."""

    def rename(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    usual = str(tmp_path / "usual")
    hf_to_megatron(str(source), usual)
    edit_tensors(source, rename)
    megatron = str(tmp_path / "megatron")
    hf_to_megatron(str(source), megatron)
    assert not verify(usual, megatron).differences
    assert not verify(str(source), megatron).differences

    megatron_to_hf(megatron, str(source), str(tmp_path / "back"))
    require_same_files(source, tmp_path / "back")


def test_an_untied_model_needs_its_embedding(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=False)
    edit_tensors(source, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is missing"):
        hf_to_megatron(str(source), str(tmp_path / "megatron"))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", "qwen3_moe", tied=False)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        hf_to_megatron(str(source), str(tmp_path / "megatron"))


def test_a_stored_copy_of_the_embedding(source: Path, tmp_path: Path) -> None:
    """Both ways: it is not in Megatron's checkpoint, and is there again afterwards."""
    edit_tensors(
        source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    hf_to_megatron(str(source), str(tmp_path / "megatron"))
    assert "output_layer.weight" not in Checkpoint(tmp_path / "megatron/release", "").tensors
    megatron_to_hf(str(tmp_path / "megatron"), str(source), str(tmp_path / "back"))
    assert (source / "model.safetensors").read_bytes() == (
        tmp_path / "back/model.safetensors"
    ).read_bytes()
    found = verify(str(source), str(tmp_path / "megatron"))
    assert found.num_tensors == len(load_file(source / "model.safetensors"))
    assert not found.differences


def test_a_dtype_for_each_tensor(source: Path, tmp_path: Path) -> None:
    """Norms in float32 beside weights in bfloat16: each comes back as it was."""

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if "norm" in name else tensor.bfloat16()

    edit_tensors(source, narrow)
    hf_to_megatron(str(source), str(tmp_path / "megatron"))
    megatron_to_hf(str(tmp_path / "megatron"), str(source), str(tmp_path / "back"))
    assert (source / "model.safetensors").read_bytes() == (
        tmp_path / "back/model.safetensors"
    ).read_bytes()
    (source / "model.safetensors").rename(
        tmp_path / "kept.safetensors"
    )  # and without them to look at
    megatron_to_hf(str(tmp_path / "megatron"), str(source), str(tmp_path / "back"))
    assert (tmp_path / "kept.safetensors").read_bytes() == (
        tmp_path / "back/model.safetensors"
    ).read_bytes()


def padded_logits(
    layout: Layout, rank: int, meeting: Path, hf: str, megatron: list[str]
) -> list[Any]:
    from miles.architecture.families import read_shape
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load
    from miles.train.rank.trainer import Trainer
    from tests.support.ranks import start, trainer_settings

    start(layout, rank, meeting)
    found = []
    for url in megatron:
        shape = read_shape(hf)
        trainer = Trainer(trainer_settings(shape, layout, num_sources=1), rank)
        newest = checkpoint_folder.find(url)
        assert newest is not None
        checkpoint_load.load(trainer, newest, model_only=True)
        found.append(trainer.logits(range(100)))

    (Path(newest.url) / "common.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"release: its metadata\.json or its common part"):
        checkpoint_load.load(trainer, newest, model_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_added_and_removed(tmp_path: Path, tied: bool) -> None:
    source = make_hf(tmp_path / "hf", "qwen3", tied=tied, vocab_size=151)
    hf_to_megatron(str(source), str(tmp_path / "plain"))
    hf_to_megatron(str(source), str(tmp_path / "padded"), make_vocab_size_divisible_by=128)
    for name, rows in (("plain", 151), ("padded", 256)):
        checkpoint = Checkpoint(tmp_path / name / "release", "")
        assert checkpoint.args["padded_vocab_size"] == rows
        keys = ["embedding.word_embeddings.weight", *([] if tied else ["output_layer.weight"])]
        for key in keys:
            assert tuple(checkpoint.tensors[key].size) == (rows, 64)
        assert not verify(str(source), str(tmp_path / name)).differences
        megatron_to_hf(str(tmp_path / name), str(source), str(tmp_path / "back"))
        assert (source / "model.safetensors").read_bytes() == (
            tmp_path / "back/model.safetensors"
        ).read_bytes()
    behind = checkpoint.read(keys[-1], (151, 0), torch.ones(105, 64))
    assert not behind.any()
    (logits,) = run_ranks(
        padded_logits, Layout(1), str(source), [str(tmp_path / "plain"), str(tmp_path / "padded")]
    )
    assert (logits[0] == logits[1]).all()  # the trainer takes the rows that it has


def test_the_folder_of_a_run_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TRACKER).write_text("500")
    with pytest.raises(
        CheckpointError,
        match=rf"run: holds the checkpoints of a run \({TRACKER} names iter_0000500\)",
    ):
        hf_to_megatron(str(source), str(tmp_path / "run"))
    assert (tmp_path / "run" / TRACKER).read_text() == "500"


def test_the_folder_of_the_weights_is_refused(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"hf/: is --hf-checkpoint itself: give another"):
        hf_to_megatron(str(source), f"{source}/")
    assert not (source / "release").exists()


def test_again_into_the_same_folder(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    hf_to_megatron(str(source), str(target))
    edit_tensors(source, lambda t: t["model.norm.weight"].add_(1))
    hf_to_megatron(str(source), str(target))
    assert not verify(str(source), str(target)).differences
    assert sorted(path.name for path in target.iterdir()) == [TRACKER, "release"]


def test_two_at_once_do_not_mix(source: Path, tmp_path: Path) -> None:
    with (
        atomic_folders.appearing(tmp_path / "megatron/release"),
        pytest.raises(CheckpointError, match="release: another conversion is writing it"),
    ):
        hf_to_megatron(str(source), str(tmp_path / "megatron"))
    hf_to_megatron(str(source), str(tmp_path / "megatron"))


def test_the_bar_counts_bytes(source: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    console = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    hf_to_megatron(str(source), str(tmp_path / "megatron"), console=console)
    shown = screen.getvalue()
    kilobytes = (
        sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values()) / 1000
    )
    assert "converting" in shown
    assert f"{kilobytes:.1f}/{kilobytes:.1f} kB" in shown
    assert "0:00:00" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "number"),
    [
        ("hf-to-megatron", signal.SIGKILL),
        ("megatron-to-hf", signal.SIGKILL),
        ("hf-to-megatron", signal.SIGINT),
        ("megatron-to-hf", signal.SIGTERM),
    ],
)
def test_interrupted_it_leaves_nothing_that_looks_complete(
    source: Path, tmp_path: Path, direction: str, number: signal.Signals
) -> None:
    """The model takes long enough to be stopped in the middle, and replaces one that was complete."""
    hf_to_megatron(str(source), str(tmp_path / "megatron"))
    target = tmp_path / ("megatron/release" if direction == "hf-to-megatron" else "export")
    if direction == "hf-to-megatron":
        words = ["--hf-checkpoint", source, "--save", tmp_path / "megatron"]
    else:
        words = ["--load", tmp_path / "megatron", "--hf-checkpoint", source, "--save", target]
    line = [sys.executable, "-m", "tests.support.slowly", "convert", direction, *map(str, words)]
    staged = target.with_name(f".{target.name}.converting")
    before = sorted(path.name for path in target.iterdir()) if target.exists() else None

    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )

    def is_being_written() -> bool:
        assert process.poll() is None, process.communicate()
        return any(path.stat().st_size > 8 for path in staged.rglob("*") if path.is_file())

    wait_until(is_being_written)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode != 0
    assert "Traceback" not in printed
    if number == signal.SIGINT:
        assert not staged.exists()
    if direction == "hf-to-megatron":  # the one that was there is whole
        assert sorted(path.name for path in target.iterdir()) == before
        assert not verify(str(source), str(tmp_path / "megatron")).differences
    else:
        assert not target.exists()
    miles_here("convert", direction, *words)
    assert not staged.exists()
    if direction == "megatron-to-hf":
        assert (source / "model.safetensors").read_bytes() == (
            target / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """Said before the first byte; and where room goes while it is written, the file is named."""
    hf_to_megatron(str(source), str(tmp_path / "megatron"))

    def convert(target: Path) -> str:
        words = {
            "hf-to-megatron": ["--hf-checkpoint", source],
            "megatron-to-hf": ["--load", tmp_path / "megatron", "--hf-checkpoint", source],
        }[direction]
        assert cli.main(["convert", direction, *map(str, words), "--save", str(target)]) == 5
        return " ".join(capture.getvalue().split())

    monkeypatch.setattr("sys.stderr", capture := io.StringIO())
    with small_disk(tmp_path / "disk", "size=400k") as disk:
        said = convert(disk / "made")
        assert re.search(
            r"miles: error: \S*converting: 0\.000642 GB are to be written, 0\.00041 GB are free",
            said,
        )
        monkeypatch.setattr(atomic_folders, "require_room", lambda folder, num_bytes: None)
        said = convert(disk / "made")
        assert re.search(
            r"distcp: cannot be written; is the disk full"
            r"|(tensors|distcp): cannot be written: no space left on the disk\. Make room there",
            said,
        )
        assert not any(path.is_file() for path in disk.rglob("*"))
