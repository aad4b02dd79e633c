"""OpenHermes-2.5 on Qwen3-4B-Base, on one node of eight GPUs, with the rows that `prepare` wrote.

    ray job submit --working-dir . --runtime-env-json '{"excludes": ["/runs/"]}' \\
        -- python3 -m pipelines.openhermes_qwen3 --hf-checkpoint /shared/models/Qwen3-4B-Base \\
        --data /shared/openhermes-messages --save /shared/runs/openhermes
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from miles.cli.console import path_word
from miles.train.config import TrainConfig
from pipelines.recipe import (
    PACKED_STEPS,
    configure,
    gpu_words,
    launch,
    parse_flags,
    recipe_parser_without_places,
    words_of,
)


def config(hf_checkpoint: str, data: str, save: str, num_gpus: int = 8) -> TrainConfig:
    """Return the run: one epoch, 128 rows a step, a rate that falls from 1e-5 along a cosine.

    Args:
        hf_checkpoint: folder with config.json, tokenizer and the weights to begin from.
        data: folder that `miles prepare openhermes` wrote, or any files of rows.
        save: folder for the run's checkpoints.
        num_gpus: GPUs of the node, each a data-parallel rank.
    """
    return configure(line(hf_checkpoint, data, save, num_gpus))


def line(hf_checkpoint: str, data: str, save: str, num_gpus: int) -> list[str]:
    """Return the same as a line of `miles train`."""
    return [
        "--hf-checkpoint",
        hf_checkpoint,
        "--prompt-data",
        "openhermes",
        data,
        "--save",
        save,
        *gpu_words(num_gpus),
        *words_of(PACKED_STEPS),
        *words_of("--lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 100"),
        *words_of("--num-epoch 1 --save-interval 500 --loader-cpus 8"),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Train, and return the exit status."""
    parser = recipe_parser_without_places(__doc__)
    for flag in ("--hf-checkpoint", "--data", "--save"):
        parser.add_argument(flag, type=path_word, required=True)
    parser.add_argument("--num-gpus", type=int, default=8)
    flags = parse_flags(parser, words)
    places = flags.hf_checkpoint, flags.data, flags.save
    return launch(lambda: line(*places, flags.num_gpus), flags)


if __name__ == "__main__":
    sys.exit(main())
