"""Several data sets at once, by weight: the loss of each, in training and on held-out rows.

    ray job submit --working-dir . --runtime-env-json '{"excludes": ["/runs/"]}' \\
        -- python3 -m pipelines.mixture --model-dir /shared/models --data-dir /shared/data \\
        --output-dir /shared/runs/mixture

--model-dir has the folder Qwen3-4B-Base, --data-dir a file for each source (`SOURCES`). Watch
`sft/loss/<source>` and `eval/loss/<source>`. For other sources: --extra-args "--prompt-data notes
/shared/notes.jsonl code /shared/code.parquet --prompt-data-weights 3 1".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

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

MODEL = "Qwen3-4B-Base"

SOURCES = {
    "openhermes2_5.parquet": 3,
    "tulu3.parquet": 2,
    "openr1_math.parquet": 1,
}
"""File of rows -> its weight. An epoch has as many rows as all files together, and each step has
each source's share of them."""


def config(
    model_dir: str,
    data_dir: str,
    output_dir: str,
    num_gpus_per_node: int = 8,
    extra_args: str = "",
) -> TrainConfig:
    """Return the run: one epoch of the mixture, and a hundredth of the rows held out.

    Args:
        model_dir: folder with the folder Qwen3-4B-Base.
        data_dir: folder with the files of `SOURCES`.
        output_dir: folder of all that the run writes.
        num_gpus_per_node: GPUs of the one node.
        extra_args: further flags of `miles train`, which win.
    """
    return configure(line(model_dir, data_dir, output_dir, num_gpus_per_node), extra_args)


def line(model_dir: str, data_dir: str, output_dir: str, num_gpus_per_node: int) -> list[str]:
    """Return the same as a line of `miles train`."""
    sources = []
    weights = []
    for name, weight in SOURCES.items():
        sources += [name.removesuffix(".parquet"), in_folder(data_dir, name)]
        weights.append(str(weight))

    return [
        "--hf-checkpoint",
        in_folder(model_dir, MODEL),
        "--prompt-data",
        *sources,
        "--prompt-data-weights",
        *weights,
        *output_words(output_dir),
        *gpu_words(num_gpus_per_node),
        *words_of(PACKED_STEPS),
        *words_of(FULL_FINE_TUNING),
        *words_of("--num-epoch 1 --save-interval 1000 --eval-fraction 0.01 --eval-interval 200"),
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Train, and return the exit status."""
    flags = parse_flags(recipe_parser(__doc__), words)
    places = flags.model_dir, flags.data_dir, flags.output_dir
    return launch(lambda: line(*places, flags.num_gpus_per_node), flags)


if __name__ == "__main__":
    sys.exit(main())
