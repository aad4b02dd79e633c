"""The recipes: the line in each docstring, `--dry-run` to its end, and what `--extra-args` change."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines
from miles.errors import ConfigError
from miles.train.precision import Precision
from pipelines import lora_qwen3_4b, mixture, openhermes_qwen3, run_qwen3_sft
from pipelines.recipe import configure
from tests.support.launch import QWEN3, QWEN3_235B
from tests.support.processes import PROJECT
from tests.support.row_files import random_conversations
from tests.support.streams import demo_tokenizer

SHARED = "/shared"
"""Stands for the disk of all nodes in the docstrings."""
MODELS = {"Qwen3-4B-Base": QWEN3, "Qwen3-235B-A22B": QWEN3_235B}
NAMES = [
    module.name for module in pkgutil.iter_modules(pipelines.__path__) if module.name != "recipe"
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with models, of which each has a tokenizer and no weights, and files of rows."""
    disk = tmp_path_factory.mktemp("shared")
    for name, config in MODELS.items():
        shutil.copytree(demo_tokenizer(), disk / "models" / name)
        (disk / "models" / name / "config.json").write_text(json.dumps(config))

    rows = [row for row in random_conversations(300) if row["messages"]]
    files = [disk / "data" / name for name in mixture.SOURCES]
    for file in (*files, disk / "openhermes-messages" / "part-0.parquet"):
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file)
    return disk


def recipe(name: str) -> ModuleType:
    return importlib.import_module(f"pipelines.{name}")


def submitted(module: ModuleType, disk: Path) -> list[str]:
    """Return the script's words of the `ray job submit` line in a docstring."""
    text = (module.__doc__ or "").replace(SHARED, str(disk))
    (line,) = re.findall(r"^    (ray job submit (?:.*\\\n)*.*)$", text, re.MULTILINE)
    words = shlex.split(line.replace("\\\n", " "))
    start = words.index("--")
    assert words[start + 1 : start + 4] == ["python3", "-m", module.__name__]
    return words[start + 4 :]


@pytest.mark.parametrize("name", NAMES)
def test_the_line_of_each_docstring_is_a_dry_run(
    shared: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe(name)
    # These are few rows: the warm-up of one recipe would be longer than the run.
    more = ["--extra-args", "--lr-warmup-iters 2", "--dry-run"]
    status = module.main([*submitted(module, shared), *more])

    printed = capsys.readouterr()
    assert status == 3, printed.err
    assert "no weights there" in printed.err, printed.err
    assert "after 2 steps, cosine" in printed.out
    assert re.search(r"fits on GPUs of (24|40|48|80) GiB or more", printed.out)
    assert "has no effect" not in printed.out
    assert not list(shared.glob("runs*")), "nothing is written"


def test_every_recipe_is_listed_in_the_sign() -> None:
    sign = pipelines.__doc__ or ""
    assert set(re.findall(r"^    (\w+)  ", sign, re.MULTILINE)) == {*NAMES, "recipe"}


def test_the_larger_model_takes_nodes_for_32_gpus(shared: Path) -> None:
    def layout(num_gpus_per_node: int, extra_args: str = "") -> tuple[int, int, int, int, int]:
        cluster = run_qwen3_sft.config(
            "Qwen3-235B-A22B",
            str(shared / "models"),
            str(shared / "data"),
            str(shared / "run"),
            num_gpus_per_node,
            extra_args,
        ).cluster
        sizes = (cluster.num_nodes, cluster.gpus_per_node)
        return (*sizes, cluster.tensor, cluster.expert, cluster.layout.expert_data)

    assert layout(8) == (4, 8, 4, 32, 1)
    assert layout(4) == (8, 4, 4, 32, 1)
    assert layout(8, "--actor-num-nodes 8") == (8, 8, 4, 32, 2)
    with pytest.raises(ConfigError, match="35 ranks"):
        layout(5)
    with pytest.raises(ConfigError, match="--num-gpus-per-node must be positive, not 0"):
        layout(0)


def test_a_mixture_has_sources_weights_and_evaluation(shared: Path) -> None:
    places = str(shared / "models"), str(shared / "data"), str(shared / "run")
    config = mixture.config(*places)
    names = [source.name for source in config.data.sources]
    assert names == ["openhermes2_5", "tulu3", "openr1_math"]
    assert config.data.order.weights == (3, 2, 1)
    assert config.data.held_out_fraction == 0.01

    rows = shlex.quote(str(shared / "data" / "tulu3.parquet"))
    other = mixture.config(*places, extra_args=f"--prompt-data {rows} --prompt-data-weights 1")
    assert [source.name for source in other.data.sources] == ["tulu3"]


def test_adapters_are_trained_alone(shared: Path) -> None:
    places = str(shared / "models"), str(shared / "data"), str(shared / "run")
    config = lora_qwen3_4b.config(*places, extra_args="--target-modules q_proj v_proj")
    assert (config.lora.rank, config.lora.alpha) == (16, 32)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.cluster.world_size == 1
    plain = lora_qwen3_4b.config(*places)
    assert plain.lora.target_modules == ("all-linear",)
    assert plain.optimizer.lr == 10 * run_qwen3_sft.config("Qwen3-4B-Base", *places).optimizer.lr


def test_extra_words_win_over_the_recipe_and_over_choices_in_it(shared: Path) -> None:
    line = openhermes_qwen3.line(str(shared / "models/Qwen3-4B-Base"), "rows", "run", 8)
    plain = configure(line)
    assert (plain.precision, plain.optimizer.lr_warmup_iters) == (Precision.BF16, 100)

    config = configure(line, "--lr 2e-5 --lr-warmup-fraction 0.2 --fp16 --save 'my run'")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.lr_warmup_iters) == (2e-5, 0)
    assert optimizer.lr_warmup_fraction == 0.2
    assert config.precision is Precision.FP16
    assert Path(config.save).name == "my run"
    assert config.data.order == plain.data.order

    with pytest.raises(ConfigError, match="--extra-args: cannot be divided into words"):
        configure(line, "--save 'my run")
    with pytest.raises(ConfigError, match="there is no flag --learning-rate"):
        configure(line, "--learning-rate 1")


def test_a_file_stands_between_the_recipe_and_the_line(shared: Path, tmp_path: Path) -> None:
    line = openhermes_qwen3.line(str(shared / "models/Qwen3-4B-Base"), "rows", "run", 8)
    file = tmp_path / "more.yaml"
    file.write_text("lr: 3e-5\nlr_warmup_fraction: 0.3\nno_bf16: true\n")
    config = configure(line, f"--config {file} --lr 4e-5")
    assert (config.optimizer.lr, config.optimizer.lr_warmup_fraction) == (4e-5, 0.3)
    assert config.precision is Precision.FP32
    assert config.save_interval == 500


def test_a_script_takes_one_flag_as_extra_and_shows_no_key(shared: Path) -> None:
    """`argparse` takes a word that begins with dashes for a flag; Ray's list of jobs shows words."""
    places = ("--hf-checkpoint", str(shared / "models/Qwen3-4B-Base"), "--data", "rows")
    program = (
        "from pathlib import Path\n"
        "from pipelines import openhermes_qwen3\n"
        "status = openhermes_qwen3.main()\n"
        "print(status, Path('/proc/self/cmdline').read_text().split(chr(0)))\n"
    )

    def outcome(*words: str) -> tuple[str, str]:
        ended = subprocess.run(
            [sys.executable, "-c", program, *places, "--save", "run", *words],
            cwd=PROJECT,
            capture_output=True,
            text=True,
        )
        return ended.stdout, ended.stderr

    printed, error = outcome("--extra-args", "--load-format")
    assert "there is no flag --load-format" in error
    assert printed.startswith("2 ")

    printed, error = outcome("--extra-args", "--wandb-key 0123abcd --seed")
    assert "0123abcd" not in printed + error
    assert "--extra-args', 'xxxx" in printed
