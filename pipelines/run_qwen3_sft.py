"""Full fine-tuning of Qwen3 on OpenHermes-2.5, as Miles's own scripts do it.

On a Ray cluster, from the root of the checkout, to folders that all nodes see:

    ray job submit --working-dir . --runtime-env-json '{"excludes": ["/runs/"]}' \\
        -- python3 -m pipelines.run_qwen3_sft --model-name Qwen3-235B-A22B \\
        --model-dir /shared/models --data-dir /shared/data --output-dir /shared/runs/qwen3-235b

--model-dir has the folder Qwen3-235B-A22B as Hugging Face's hub has it, --data-dir has
openhermes2_5.parquet. With --dry-run it needs no GPU, and neither Ray nor the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from miles.train.config import TrainConfig
from pipelines.recipe import (
    FULL_FINE_TUNING,
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

ROWS = "openhermes2_5.parquet"


@dataclass(frozen=True)
class Model:
    """A model, and what is its own in the line."""

    num_gpus: int | None
    """that its layout needs; None: it takes those of one node"""
    words: str


MODELS = {
    "Qwen3-4B-Base": Model(num_gpus=None, words="--adam-beta2 0.95"),
    # docs/memory.md has the arithmetic.
    "Qwen3-235B-A22B": Model(
        num_gpus=32,
        words="""
            --adam-beta2 0.98 --tensor-model-parallel-size 4 --sequence-parallel
            --expert-model-parallel-size 32 --expert-tensor-parallel-size 1
            --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d
            --use-precision-aware-optimizer
        """,
    ),
}


def config(
    model_name: str,
    model_dir: str,
    data_dir: str,
    output_dir: str,
    num_gpus_per_node: int = 8,
    extra_args: str = "",
) -> TrainConfig:
    """Return the run: three epochs, 128 rows a step, a rate that falls from 1e-5 along a cosine.

    Args:
        model_name: of `MODELS`.
        model_dir: folder that has a folder of that name, in Hugging Face's format.
        data_dir: folder with openhermes2_5.parquet.
        output_dir: folder of all that the run writes.
        num_gpus_per_node: GPUs of a node. The larger model takes as many nodes as have 32 GPUs.
        extra_args: further flags of `miles train`, which win.
    """
    words = line(model_name, model_dir, data_dir, output_dir, num_gpus_per_node)
    return configure(words, extra_args)


def line(
    model_name: str, model_dir: str, data_dir: str, output_dir: str, num_gpus_per_node: int
) -> list[str]:
    """Return the same as a line of `miles train`."""
    model = MODELS[model_name]
    return [
        "--hf-checkpoint",
        in_folder(model_dir, model_name),
        "--prompt-data",
        in_folder(data_dir, ROWS),
        *output_words(output_dir),
        *gpu_words(num_gpus_per_node, model.num_gpus),
        *words_of(PACKED_STEPS),
        *words_of(FULL_FINE_TUNING),
        *words_of("--num-epoch 3 --save-interval 1000"),
        *words_of(model.words),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Train, and return the exit status."""
    parser = recipe_parser(__doc__)
    parser.add_argument(
        "--model-name", choices=MODELS, default="Qwen3-4B-Base", help="(default: %(default)s)"
    )
    flags = parse_flags(parser, words)
    places = flags.model_dir, flags.data_dir, flags.output_dir
    return launch(lambda: line(flags.model_name, *places, flags.num_gpus_per_node), flags)


if __name__ == "__main__":
    sys.exit(main())
