"""Miles's SFT lines run word for word: `--dry-run` to its end, and the configuration that results.

A golden file for each line has the resolved configuration of a run on GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.cli import main
from miles.train.driver.opening import describe
from miles.train.launch.arguments import read_line
from tests.support.launch import QWEN3, QWEN3_235B
from tests.support.row_files import random_conversations
from tests.support.streams import demo_tokenizer

BASE = "/base"
"""Stands for the folder of the models in the lines."""
NUM_ROWS = 1_000

FILES = """
    --hf-checkpoint /base/MODEL/ --ref-load /base/MODEL_torch_dist --load /base/MODEL_miles/
    --save /base/MODEL_miles/ --save-interval 1000
"""
DATA = """
    --rollout-function-path miles.rollout.sft_rollout.generate_rollout
    --prompt-data /base/openhermes2_5.parquet --input-key messages --rollout-shuffle --num-epoch 3
    --rollout-batch-size 128 --global-batch-size 128 --loss-type sft_loss --calculate-per-token-loss
    --disable-compute-advantages-and-returns --debug-train-only
"""
OPTIMIZER = """
    --optimizer adam --lr 1e-5 --lr-decay-style cosine --min-lr 1e-6 --lr-warmup-fraction 0.1
    --weight-decay 0.1 --adam-beta1 0.9
"""
WANDB = """
    --use-wandb --wandb-project miles-dev --wandb-group sft --wandb-key 0123456789
    --disable-wandb-random-suffix
"""
MISC = """
    --pipeline-model-parallel-size 1 --context-parallel-size 1 --expert-tensor-parallel-size 1
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --use-dynamic-batch-size --max-tokens-per-gpu 9216 --attention-dropout 0.0 --hidden-dropout 0.0
    --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --attention-backend flash
    --actor-num-gpus-per-node 8 --num-gpus-per-node 8
"""

QWEN3_4B_LINE = f"""
    --swiglu --num-layers 36 --hidden-size 2560 --ffn-hidden-size 9728 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --use-rotary-position-embeddings
    --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --rotary-base 1000000
    --vocab-size 151936 --kv-channels 128 --qk-layernorm
    {FILES.replace("MODEL", "Qwen3-4B-Base")} {DATA} {OPTIMIZER} --adam-beta2 0.95 {WANDB} {MISC}
    --actor-num-nodes 1 --tensor-model-parallel-size 1 --sequence-parallel
    --expert-model-parallel-size 1
"""

QWEN3_235B_LINE = f"""
    --disable-bias-linear --qk-layernorm --group-query-attention --num-attention-heads 64
    --num-query-groups 4 --kv-channels 128 --num-layers 94 --hidden-size 4096
    --ffn-hidden-size 12288 --normalization RMSNorm --position-embedding-type rope
    --norm-epsilon 1e-6 --rotary-percent 1.0 --swiglu --untie-embeddings-and-output-weights
    --vocab-size 151936 --rotary-base 1000000 --moe-ffn-hidden-size 1536
    --moe-router-score-function softmax --moe-token-dispatcher-type alltoall --moe-router-topk 8
    --moe-layer-freq [{",".join(["1"] * 94)}] --num-experts 128 --moe-grouped-gemm
    --moe-token-drop-policy probs --moe-router-dtype fp32 --moe-permute-fusion
    --moe-aux-loss-coeff 0
    {FILES.replace("MODEL", "Qwen3-235B-A22B")} {DATA} {OPTIMIZER} --adam-beta2 0.98
    --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d --use-precision-aware-optimizer
    {WANDB} {MISC} --actor-num-nodes 4 --tensor-model-parallel-size 4 --sequence-parallel
    --expert-model-parallel-size 32
"""

LINES = {
    "qwen3_4b": ("Qwen3-4B-Base", QWEN3, QWEN3_4B_LINE),
    "qwen3_235b": ("Qwen3-235B-A22B", QWEN3_235B, QWEN3_235B_LINE),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows, and of each model the configuration and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("base")
    for name, config, _ in LINES.values():
        shutil.copytree(demo_tokenizer(), folder / name)
        (folder / name / "config.json").write_text(json.dumps(config))
    # A run refuses a set of which more than a hundredth cannot be used.
    rows = [row for row in random_conversations(NUM_ROWS + 100) if row["messages"]][:NUM_ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "openhermes2_5.parquet")
    return folder


def golden(model: str) -> Path:
    """Return the golden file of a line.

    Written anew, after a change that is meant, by
    MILES_WRITE_GOLDEN=1 pytest tests/train/estimate/test_sft_lines.py
    """
    return Path(__file__).with_name(f"golden_{model}_sft.json")


@pytest.mark.parametrize("model", LINES)
def test_the_sft_line_of_miles_runs_word_for_word(
    base: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = LINES[model][2].replace(BASE, str(base)).split()
    line = read_line(words)
    config = describe(line.config.for_device(has_gpus=True)).replace(str(base), BASE)
    if os.environ.get("MILES_WRITE_GOLDEN"):
        golden(model).write_text(config + "\n")
    assert json.loads(config) == json.loads(golden(model).read_text())
    assert "0123456789" not in config

    monkeypatch.setenv("COLUMNS", "110")
    assert main(["train", *words, "--dry-run"]) == 3, "there are no weights"
    text = capsys.readouterr().out
    for notice in line.notices:
        assert f"  {notice}\n" in text
    assert "0123456789" not in text
    assert "24: 8 an epoch x 3" in text
    assert "bfloat16 on GPUs, optimized in float32; on a CPU float32" in text
    assert text.rstrip().splitlines()[-1].endswith("_miles"), "it ends with the run's folder"
    assert not list(base.glob("*_miles"))


def test_the_notices_of_the_lines(base: Path) -> None:
    def begins(model: str) -> list[str]:
        words = LINES[model][2].replace(BASE, str(base)).split()
        return [" ".join(notice.split()[:4]) for notice in read_line(words).notices]

    assert begins("qwen3_4b") == ["--sequence-parallel is left out:"]
    assert begins("qwen3_235b") == ["--moe-permute-fusion has no effect:"]
