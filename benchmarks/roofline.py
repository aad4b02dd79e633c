"""The least time that a training step takes on a GPU: the tables of docs/performance.md.

    python benchmarks/roofline.py

No GPU is needed: it is arithmetic (miles/train/estimate/roofline.py). A rank that would not fit
into a GPU's memory, by the estimate of `--dry-run`, is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

from _gpu_models import RECOMPUTE_LAYERS, SHAPES

from miles.train.estimate.memory import Training, estimate
from miles.train.estimate.roofline import CHIPS, Chip, Floor, StepWork, floor
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig

MODELS = {
    "Qwen3-1.7B, 1 GPU": (SHAPES["qwen3-1.7b"], Layout(1)),
    "Qwen3-4B, 8 GPUs": (SHAPES["qwen3-4b"], Layout(8)),
    "Qwen3-30B-A3B, 16 GPUs, experts over 8": (SHAPES["qwen3-30b-a3b"], Layout(16, expert=8)),
}
USABLE_GIB = {"H100 SXM": 79.6 * 0.9, "H200": 140.4 * 0.9}
"""The GPU's memory, less a tenth for CUDA, NCCL and fragmentation."""
MICRO_BATCHES = (9216, 16384)
NUM_MICRO_BATCHES = 8
FLASH_2_FLOPS = 310e12
CUDNN_FLOPS = 534e12
"""Attention over 8,192 tokens on an H100, measured."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A kind of rows, and the attention kernel they are computed with."""

    name: str
    pairs_per_token: float
    trained_share: float
    length: int
    """tokens of the longest"""
    attention_flops: float | None = None
    """operations a second of the attention kernel; None: those of torch's, on short samples"""


ROWS = (
    Rows("instructions", 93.4, 0.52, 1556),
    Rows("16,384 tokens", (16384 + 1) / 2, 1.0, 16384, CUDNN_FLOPS),
    Rows("16,384 tokens, FlashAttention 2", (16384 + 1) / 2, 1.0, 16384, FLASH_2_FLOPS),
)
"""Instructions have the lengths of OpenHermes 2.5: 122 tokens on average, 1,556 at most."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for line in (*totals(), "", *shares()):
        print(line)


def totals() -> Iterator[str]:
    """Yield a table of tokens a second and MFU."""
    columns = [f"{chip.name}, {tokens:,}" for chip in CHIPS for tokens in MICRO_BATCHES]
    yield f"| model | rows | layers computed again | {' | '.join(columns)} |"
    yield f"|---|---|---|{'---|' * len(columns)}"
    for model in MODELS:
        for rows in ROWS:
            for recompute in (KEEP_ALL, RECOMPUTE_LAYERS):
                cells = [
                    _cell(model, rows, recompute, chip, tokens)
                    for chip in CHIPS
                    for tokens in MICRO_BATCHES
                ]
                again = "no" if recompute is KEEP_ALL else "yes"
                yield f"| {model} | {rows.name} | {again} | {' | '.join(cells)} |"


def shares() -> Iterator[str]:
    """Yield a table of where the time goes, of an H100 with micro-batches of 9,216 or 16,384."""
    instructions, long_rows, _ = ROWS
    columns: dict[str, Floor] = {}
    for model, (shape, layout) in MODELS.items():
        for rows, tokens in ((instructions, 9216), (long_rows, 16384)):
            work = _work(rows, RECOMPUTE_LAYERS, tokens)
            name = f"{model.split(',')[0]}, {rows.name}"
            columns[name] = floor(shape, layout, work, _with_attention(CHIPS[0], rows))

    yield f"| part | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    names = dict.fromkeys(part.name for found in columns.values() for part in found.parts)
    for name in names:
        cells = []
        for found in columns.values():
            seconds = sum(part.seconds for part in found.parts if part.name == name)
            cells.append(f"{seconds / found.seconds:.1%}" if seconds else "")
        yield f"| {name} | {' | '.join(cells)} |"
    milliseconds = [f"{found.seconds * 1e3 / NUM_MICRO_BATCHES:,.0f}" for found in columns.values()]
    yield f"| **a micro-batch, ms** | {' | '.join(milliseconds)} |"


def _cell(model: str, rows: Rows, recompute: RecomputeConfig, chip: Chip, tokens: int) -> str:
    shape, layout = MODELS[model]
    if rows.length > tokens:
        return ""
    (memory,) = estimate(
        shape,
        layout,
        Training(precision=Precision.BF16, recompute=recompute),
        max_tokens_per_gpu=tokens,
    )
    if memory.total / 2**30 > USABLE_GIB[chip.name]:
        return "does not fit"
    found = floor(shape, layout, _work(rows, recompute, tokens), _with_attention(chip, rows))
    return f"{round(found.tokens_per_second, -2):,.0f}, {found.mfu:.0%}"


def _with_attention(chip: Chip, rows: Rows) -> Chip:
    if rows.attention_flops is None:
        return chip
    return dataclasses.replace(chip, attention_flops=rows.attention_flops)


def _work(rows: Rows, recompute: RecomputeConfig, tokens: int) -> StepWork:
    return StepWork(
        num_tokens=tokens,
        num_micro_batches=NUM_MICRO_BATCHES,
        pairs_per_token=rows.pairs_per_token,
        trained_share=rows.trained_share,
        is_recomputed=recompute is not KEEP_ALL,
    )


if __name__ == "__main__":
    main()
