"""`--dry-run` from a launch line, for two real models: nothing is started or written."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from rich.console import Console

from miles.architecture.families import hf_shapes, shape_of
from miles.common.checkpoint_tracker import RELEASE, write_tracker
from miles.common.counts import counted
from miles.convert.safetensors_files import ShardedWriter, Spec
from miles.data.files.manifest import build_manifest
from miles.data.stream import stages
from miles.data.stream.survey import SAMPLE_ROWS, sample_rows, take_sample
from miles.errors import CheckpointError, ConfigError, DataError
from miles.train.driver.loop import train
from miles.train.estimate.dry_run import dry_run
from miles.train.launch.arguments import parse
from tests.support.checkpoints import write_checkpoint
from tests.support.launch import QWEN3, QWEN3_235B
from tests.support.models import edit_config
from tests.support.streams import demo_settings, demo_tokenizer

FOUR_B = ["--bf16", "--max-tokens-per-gpu", "9216", "--max-sample-tokens", "512"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dry")
    demo_settings(made)
    for name, config in (("4b", QWEN3), ("235b", QWEN3_235B)):
        shutil.copytree(demo_tokenizer(), made / name)
        (made / name / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test beside these may have a Ray; a dry run starts none and joins none."""

    def start(*words: Any, **more: Any) -> None:
        raise AssertionError("a dry run needs no Ray")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "put", start)


def words(folder: Path, save: Path, model: str, *more: str) -> list[str]:
    rows: list[str] = []
    for file in sorted((folder / "rows").iterdir()):
        rows += [file.stem, str(file)]
    return [
        "--hf-checkpoint",
        str(folder / model),
        "--prompt-data",
        *rows,
        "--save",
        str(save),
        *more,
    ]


def printed(line: list[str]) -> str:
    """Return what a dry run prints. Most of these models have no weights: that is said last."""
    screen = io.StringIO()
    try:
        dry_run(parse([*line, "--dry-run"]), Console(file=screen, width=110, legacy_windows=False))
    except CheckpointError as error:
        if "no weights there" not in str(error):
            raise
        assert "missing" in screen.getvalue()
    return screen.getvalue()


def memory_row(text: str, stage: int) -> list[float]:
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == [str(stage)]]
    (row,) = [row for row in rows if len(row) == 9]
    return [float(word.replace(",", "")) for word in row]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_of_80_columns_has_whole_words(folder: Path, tmp_path: Path) -> None:
    line = [*words(folder, tmp_path, "4b", *FOUR_B), "--num-epoch", "3", "--dry-run"]
    screen = Terminal()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None, _environ={})
    with pytest.raises(CheckpointError, match="no weights there"):
        dry_run(parse(line), console)
    for text in screen.getvalue().splitlines():
        num_words = len(text.split())
        is_path = num_words <= 2 and "/" in text  # a path stays whole, beside its label at most
        assert len(text) <= 80 or is_path or str(folder) in text, text


@pytest.mark.parametrize("gpus", [1, 8])
def test_qwen3_4b(folder: Path, tmp_path: Path, gpus: int) -> None:
    save = tmp_path / "save"
    text = printed(
        words(
            folder, save, "4b", *FOUR_B, "--actor-num-gpus-per-node", str(gpus), "--num-epoch", "3"
        )
    )
    assert "4,022,468,096 (4.02 billion)" in text
    assert "18: 6 an epoch x 3" in text
    assert f"{counted(gpus, 'rank')}: tensor 1 x pipeline 1 x data {gpus}" in text
    _, layers, parameters, weights, gradients, optimizer, *_, total = memory_row(text, 0)
    assert (layers, parameters) == (36, 4_022_468_096)
    assert weights == pytest.approx(4_022_468_096 * 2 / 2**30, abs=0.01)
    assert gradients == pytest.approx(4_022_468_096 * 4 / 2**30, abs=0.01)
    assert optimizer == pytest.approx(4_022_468_096 * 12 / gpus / 2**30, abs=0.01)
    assert total < 192
    assert not save.exists()


def test_qwen3_235b_on_four_nodes_of_eight(folder: Path, tmp_path: Path) -> None:
    line = """--actor-num-nodes 4 --actor-num-gpus-per-node 8 --tensor-model-parallel-size 4
        --sequence-parallel --pipeline-model-parallel-size 2 --expert-model-parallel-size 16
        --expert-tensor-parallel-size 1 --recompute-granularity full --recompute-method uniform
        --recompute-num-layers 1 --eval-fraction 0.05 --eval-interval 10"""
    text = printed(words(folder, tmp_path, "235b", *FOUR_B, *line.split()))
    assert "235,093,634,560 (235.09 billion, 22.19 billion of them for a token)" in text
    assert (
        "32 ranks: tensor 4 x pipeline 2 x data 4 with sequence parallelism; experts over 16"
        in text
    )
    assert "ranks 8-15: pipeline stage 0, data rank 2-3" in text
    assert "ranks 24-31: pipeline stage 1, data rank 2-3" in text
    assert "5.0% of the rows, not trained on, every 10 steps and at the end" in text

    experts = 47 * 128 // 16 * 3 * 4096 * 1536
    attention = (4096 * (64 + 8) * 128 + 64 * 128 * 4096) // 4
    norms_and_router = 2 * 4096 + 2 * 128 + 4096 * 128
    dense = 47 * (attention + norms_and_router) + 151936 * 4096 // 4
    assert memory_row(text, 0)[2] == experts + dense
    assert memory_row(text, 1)[2] == experts + dense + 4096
    # 16 ranks hold one stage's experts, each others: none of their state can be divided.
    assert memory_row(text, 0)[5] == pytest.approx(
        (experts * 12 + dense * 12 / 4) / 2**30, abs=0.01
    )
    assert "most of it are weights and their state" in text
    assert "or --optimizer-cpu-offload" in " ".join(text.split())

    offload = "--optimizer-cpu-offload --use-precision-aware-optimizer --optimizer-offload-fraction"
    text = printed(
        words(folder, tmp_path, "235b", *FOUR_B, *line.split(), *offload.split(), "0.75")
    )
    on_gpu = (experts * 12 + dense * 12 / 4) / 4 / 2**30
    in_machine = (experts * 16 + (dense + 4096) * 16 / 4) * 0.75 / 2**30
    assert memory_row(text, 0)[5] == pytest.approx(on_gpu, abs=0.01)
    text = " ".join(text.split())
    assert f"{in_machine * 8:,.2f} GiB of the memory of a machine are the optimizer's" in text
    assert "or --optimizer-cpu-offload" not in text


def test_lora_says_what_is_trained_and_saved(folder: Path, tmp_path: Path) -> None:
    rank = ["--lora-rank", "16", "--target-modules", "q_proj", "v_proj"]
    text = printed(words(folder, tmp_path / "save", "4b", *FOUR_B, "--num-epoch", "1", *rank))
    trained = 36 * 16 * ((2560 + 4096) + (2560 + 1024))
    assert f"{trained:,} parameters beside 4,022,468,096 frozen ones" in " ".join(text.split())
    assert "training all weights would take" in text

    with pytest.raises(ConfigError, match="--lora-rank 2561 is more than the model's hidden size"):
        printed(words(folder, tmp_path / "save", "4b", *FOUR_B, "--lora-rank", "2561"))


def test_what_stops_a_run_stops_the_dry_run(folder: Path, tmp_path: Path) -> None:
    line = "--actor-num-gpus-per-node 4 --pipeline-model-parallel-size 4"
    with pytest.raises(ConfigError, match=r"layers \(94\) cannot be divided"):
        printed(words(folder, tmp_path, "235b", *line.split()))
    with pytest.raises(ConfigError, match="is not shorter than the run, which has 6 steps"):
        printed(words(folder, tmp_path, "4b", "--lr-warmup-iters", "100"))
    with pytest.raises(DataError, match=r"none of 652 sampled rows can be used: 6\d\d too_long"):
        printed(words(folder, tmp_path, "4b", "--max-sample-tokens", "8"))


def test_offloading_without_bf16_is_said_to_need_a_gpu(folder: Path, tmp_path: Path) -> None:
    offload = ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
    text = " ".join(printed(words(folder, tmp_path, "4b", *FOUR_B[1:], *offload)).split())
    assert "on a CPU float32, which --optimizer-cpu-offload refuses: it needs --bf16" in text


def test_weights_are_compared_by_their_headers(folder: Path, tmp_path: Path) -> None:
    """The files have the size of real ones, and hold nothing but holes behind the headers."""
    hf = shutil.copytree(folder / "4b", tmp_path / "hf")
    shapes = hf_shapes(shape_of(QWEN3, ""))
    specs = {name: Spec(torch.bfloat16, sizes) for name, sizes in shapes.items()}
    ShardedWriter(hf, specs, dict.fromkeys(specs, "model.safetensors")).close()

    line = words(folder, tmp_path / "run", str(hf), *FOUR_B)
    assert f"{hf},eachrankreadsitsownpart" in "".join(printed(line).split())
    edit_config(hf, head_dim=64)
    for start in (printed, lambda line: train(parse(line))):
        with pytest.raises(CheckpointError, match=r"q_proj\.weight has shape \(4096, 2560\); conf"):
            start(line)


def test_tensor_ranks_across_nodes_are_warned_of(folder: Path, tmp_path: Path) -> None:
    line = "--actor-num-nodes 2 --actor-num-gpus-per-node 2 --tensor-model-parallel-size 4"
    layout = line.split()
    text = printed(words(folder, tmp_path, "4b", *FOUR_B, *layout))
    assert "the 4 tensor-parallel ranks of a replica do not lie on one node of 2" in text
    assert "warning" not in printed(words(folder, tmp_path, "4b", *FOUR_B, *layout[:4]))


def test_ids_beyond_the_vocabulary_stop_both(folder: Path, tmp_path: Path) -> None:
    small = shutil.copytree(folder / "4b", tmp_path / "small")
    edit_config(small, vocab_size=2047)
    write_checkpoint(tmp_path, RELEASE)
    write_tracker(str(tmp_path), RELEASE)
    line = words(folder, tmp_path, str(small), *FOUR_B)

    for start in (printed, lambda line: train(parse(line))):
        with pytest.raises(ConfigError, match=r"1 of the tokenizer's 2048 tokens .* is 2047; "):
            start(line)
    edit_config(small, vocab_size=2048)
    assert "fingerprint" in printed(line)


def test_rows_of_padding_are_counted(folder: Path, tmp_path: Path) -> None:
    uneven = shutil.copytree(folder / "4b", tmp_path / "uneven")
    edit_config(uneven, vocab_size=151_935)
    line = words(folder, tmp_path, str(uneven), *FOUR_B, "--actor-num-gpus-per-node", "2")
    even = words(folder, tmp_path, "4b", *FOUR_B, "--actor-num-gpus-per-node", "2")
    tensor = ["--tensor-model-parallel-size", "2"]

    text = printed([*line, *tensor])
    assert "151,935 tokens, padded to 151,936 rows, which 2 tensor-parallel ranks divide" in text
    assert memory_row(text, 0) == memory_row(printed([*even, *tensor]), 0)
    assert "padded" not in printed(line)


def test_names_are_printed_as_they_are(folder: Path, tmp_path: Path) -> None:
    line = words(folder, tmp_path / "[/red]", "4b", *FOUR_B)
    name = line.index("--prompt-data") + 1
    line[name] = "[red]x[bold]"
    text = printed(line)
    assert "[red]x[bold]" in text
    assert "/[/red], at the end" in text


def test_the_sample_covers_the_set() -> None:
    assert sample_rows(10).tolist() == list(range(10))
    rows = sample_rows(1_000_000)
    assert len(rows) == len(np.unique(rows)) == SAMPLE_ROWS
    assert (rows[0], rows[-1]) == (0, 999_999)
    assert (np.diff(rows) > 0).all()
    assert np.diff(rows).max() < 1_000_000 / 15
    assert (sample_rows(1_000_000) == rows).all()


def test_the_sample_counts_as_the_stream_does(folder: Path, tmp_path: Path) -> None:
    """The two are equal where the set is no larger than the sample."""
    config = parse(words(folder, tmp_path, "4b", *FOUR_B))
    manifest = build_manifest(config.data.sources)
    sample = take_sample(manifest, config.data)
    steps: list[Any] = list(stages.local_steps(manifest, config.data))
    assert sample.num_rows == sum(step.num_rows for step in steps)
    assert sample.lengths.sum() == sum(step.report.content.num_tokens for step in steps)
    assert len(sample.lengths) == sum(step.report.content.num_samples for step in steps)
    assert sum(sample.reasons.values()) == sum(len(step.report.rows.rejects) for step in steps)
    assert f"about {int(sample.lengths.sum()):,} tokens" in printed(
        words(folder, tmp_path, "4b", *FOUR_B)
    )
