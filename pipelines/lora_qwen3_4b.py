"""LoRA on Qwen3-4B-Base with OpenHermes-2.5: adapters on all projections, on one GPU or more.

    ray job submit --working-dir . --runtime-env-json '{"excludes": ["/runs/"]}' \\
        -- python3 -m pipelines.lora_qwen3_4b --model-dir /shared/models --data-dir /shared/data \\
        --output-dir /shared/runs/lora

--model-dir has the folder Qwen3-4B-Base, --data-dir has openhermes2_5.parquet. The export, in
--output-dir/hf, is an adapter in PEFT's format. For some projections only: --extra-args
"--target-modules q_proj v_proj".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from miles.train.config import TrainConfig
from pipelines.recipe import (
    PACKED_STEPS,
    configure,
    gpu_words,
    in_folder,
    launch,
    output_words,
    parse_flags,
    recipe_parser,
    words_of,
)
from pipelines.run_qwen3_sft import ROWS

MODEL = "Qwen3-4B-Base"

ADAPTER = """
    --lora-rank 16 --lora-alpha 32 --target-modules all-linear
    --lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0
    --num-epoch 1 --save-interval 500
"""
"""Adapters take ten times the rate that all weights would."""


def config(
    model_dir: str,
    data_dir: str,
    output_dir: str,
    num_gpus_per_node: int = 1,
    extra_args: str = "",
) -> TrainConfig:
    """Return the run: one epoch, 128 rows a step, a rate that falls from 1e-4 along a cosine.

    Args:
        model_dir: folder with the folder Qwen3-4B-Base.
        data_dir: folder with openhermes2_5.parquet.
        output_dir: folder of all that the run writes.
        num_gpus_per_node: GPUs of the one node, each a data-parallel rank.
        extra_args: further flags of `miles train`, which win.
    """
    return configure(line(model_dir, data_dir, output_dir, num_gpus_per_node), extra_args)


def line(model_dir: str, data_dir: str, output_dir: str, num_gpus_per_node: int) -> list[str]:
    """Return the same as a line of `miles train`."""
    return [
        "--hf-checkpoint",
        in_folder(model_dir, MODEL),
        "--prompt-data",
        in_folder(data_dir, ROWS),
        *output_words(output_dir),
        *gpu_words(num_gpus_per_node),
        *words_of(PACKED_STEPS),
        *words_of(ADAPTER),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Train, and return the exit status."""
    flags = parse_flags(recipe_parser(__doc__, num_gpus_per_node=1), words)
    places = flags.model_dir, flags.data_dir, flags.output_dir
    return launch(lambda: line(*places, flags.num_gpus_per_node), flags)


if __name__ == "__main__":
    sys.exit(main())
