"""What a run of adapters goes on from, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from miles.architecture.adapter import AdapterShape, adapter_parameters
from miles.architecture.families import pieces_in, read_shape
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.common.checkpoint_tracker import write_tracker
from miles.convert.peft_config import config_text
from miles.errors import CheckpointError, ConfigError
from miles.train.config import TrainConfig
from miles.train.estimate.adapter_checks import line_of, require_own_adapter, require_same_training
from miles.train.launch.arguments import parse
from miles.train.types import StartPoint
from tests.support.fault_table import NOTHING, observed
from tests.support.launch import write_model

OWN = AdapterShape(8, 16.0, ("q_proj", "v_proj"))
LINE = "--lora-rank 8 --lora-alpha 16 --target-modules q_proj v_proj"
RANK_16 = LINE.replace("rank 8", "rank 16")


def config_of(folder: Path, line: str) -> TrainConfig:
    words = f"--hf-checkpoint {folder} --prompt-data rows.parquet --save {folder}/run {line}"
    return parse(words.split())


def refused(folder: Path, line: str, adapter: AdapterShape | None, place: str = "run") -> str:
    """Return why a line does not go on from a checkpoint; "": it does."""
    write_model(folder)
    content = {} if adapter is None else {"adapter": adapter.to_json()}
    checkpoint = SavedCheckpoint(f"{folder}/{place}/iter_0000007", 7, content)
    start = StartPoint(checkpoint, is_resume=True)
    try:
        require_same_training(config_of(folder, line), read_shape(str(folder)), start)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "line",
    [LINE, f"{LINE} --lora-dropout 0.1", "--lora-rank 8 --target-modules v_proj,q_proj"],
)
def test_the_same_adapters_go_on(tmp_path: Path, line: str) -> None:
    assert refused(tmp_path, line, OWN) == ""


@pytest.mark.parametrize(
    ("line", "difference"),
    [
        (RANK_16, "--lora-rank: the checkpoint has 8, this run 16"),
        (f"{LINE} --use-rslora", "--use-rslora: the checkpoint has none, this run it"),
        (LINE.replace("16", "32"), "--lora-alpha: the checkpoint has 16, this run 32"),
        (f"{LINE} o_proj", "the checkpoint has q_proj v_proj, this run q_proj v_proj o_proj"),
    ],
)
def test_other_adapters_are_refused_with_the_line(
    tmp_path: Path, line: str, difference: str
) -> None:
    text = refused(tmp_path, line, OWN)
    assert f"cannot be resumed with another adapter: {difference}. " in text.replace(
        "--target-modules: the", "the"
    )
    assert f"To go on, give {LINE}; " in text
    observed("other adapter than the checkpoint's", refused(tmp_path, RANK_16, OWN), LINE, NOTHING)


def test_all_weights_and_adapters_are_told_apart(tmp_path: Path) -> None:
    assert refused(tmp_path, "", None) == ""
    text = refused(tmp_path, LINE, None)
    assert text.startswith(f"--save {tmp_path}/run: ")
    assert "a run that trains all weights, and --lora-rank 8 trains an adapter" in text
    assert "leave out --lora-rank" in text
    fault = "`--lora-rank` over the checkpoints of a run that trains all weights"
    observed(fault, text, "trains all weights", NOTHING)
    text = refused(tmp_path, "", OWN, "elsewhere")
    assert text.startswith(f"--load {tmp_path}/elsewhere: ")
    assert "holds the checkpoints of a LoRA run" in text
    assert f"give {LINE}. To begin from the model with it, merge it: " in text
    observed("no `--lora-rank` over the checkpoints of a LoRA run", text, LINE, NOTHING)


def test_a_new_run_trains_what_it_is_told(tmp_path: Path) -> None:
    write_model(tmp_path)
    start = StartPoint(SavedCheckpoint("hf", 0, None, is_hugging_face=True), is_resume=False)
    shape = read_shape(str(tmp_path))
    for line in ("", LINE):
        require_same_training(config_of(tmp_path, line), shape, start)


def test_an_adapter_of_another_line_is_refused_with_its_own(tmp_path: Path) -> None:
    write_model(tmp_path)
    shape = read_shape(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(config_text(OWN, "hf"))
    tensors = {}
    for parameter, place in pieces_in(adapter_parameters(shape, OWN), shape):
        tensors[parameter.hf_names(place)[0]] = torch.zeros(parameter.shape)
    save_file(tensors, tmp_path / "adapter_model.safetensors")

    def check(line: str) -> None:
        require_own_adapter(config_of(tmp_path, f"{line} --lora-adapter-path {tmp_path}"), shape)

    check(LINE)
    require_own_adapter(config_of(tmp_path, "--lora-rank 4"), shape)
    with pytest.raises(ConfigError, match="--lora-rank: the folder has 8, this run 4") as raised:
        check("--lora-rank 4")
    text = str(raised.value)
    assert text.startswith(f"--lora-adapter-path {tmp_path}: another adapter than ")
    assert "--target-modules: the folder has q_proj v_proj, this run q_proj k_proj" in text
    assert text.endswith(f"To train it further, give {LINE}")


def test_a_folder_that_is_no_adapter_is_refused_with_the_way_to_one(tmp_path: Path) -> None:
    write_model(tmp_path)
    shape = read_shape(str(tmp_path))
    run = tmp_path / "run"

    def text() -> str:
        with pytest.raises(CheckpointError) as raised:
            require_own_adapter(config_of(tmp_path, f"{LINE} --lora-adapter-path {run}"), shape)
        return str(raised.value)

    assert text().startswith(f"--lora-adapter-path {run}: no such folder: give one with an adapter")
    run.mkdir()
    assert "run/adapter_config.json" in text()
    write_tracker(str(run), 7)
    hf = config_of(tmp_path, LINE).hf_checkpoint
    line = f"miles convert megatron-to-hf --load {run} --hf-checkpoint {hf} --save ADAPTER"
    assert text().startswith(f"--lora-adapter-path {run}: holds Megatron checkpoints, and an ada")
    assert text().endswith(f"{line}; then give --lora-adapter-path ADAPTER")


def test_a_line_gives_the_adapter_again(tmp_path: Path) -> None:
    write_model(tmp_path)
    for adapter in (OWN, replace(OWN, alpha=0.5, is_rank_stabilized=True)):
        config = config_of(tmp_path, line_of(adapter))
        assert config.lora.adapter(read_shape(str(tmp_path))) == adapter
