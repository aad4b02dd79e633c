"""Rows to token ids and masks, one core: ours against transformers' own path, in the same run.

    python benchmarks/encode.py

- ours: rows of a Parquet file -> JSON text -> conversation -> ids and mask, as the loader does it
- transformers: messages that are there already ->
  `apply_chat_template(return_assistant_tokens_mask=True)` with trl's training template for Qwen3,
  which marks what is trained; `trl` itself takes this path
- encode_batch: texts that are rendered already -> ids, with no mask: the bare tokenizer

Every contender gets the same rows in turn, some thousands at a time, so that what else the machine
does hits all alike. The ratios are what is claimed; the absolute numbers are the machine's.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
from _common import (
    Bar,
    add_check_flag,
    add_sample_flags,
    exit_where_missed,
    print_bars,
    training_template,
)
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from miles.data.config import EncodeConfig, RowFormat, SourceConfig
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.rows.normalize import normalize
from miles.data.types import Conversation, Encoded

CHUNK_ROWS = 4_096
STEP_ROWS = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sample_flags(parser)
    add_check_flag(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, help="the fastest round of each contender counts"
    )
    parser.add_argument("--max-rows", type=int, help="only the first so many rows")
    parser.add_argument(
        "--min-ratio", type=float, default=4.0, help="of our speed to the transformers path's"
    )
    flags = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    manifest = build_manifest([SourceConfig("rows", (flags.source,))])
    last_row = min(manifest.num_rows, flags.max_rows or manifest.num_rows)
    format_: RowFormat = manifest.sources[0].format
    encoder = Encoder.from_config(
        EncodeConfig(tokenizer=flags.tokenizer, max_sample_tokens=1 << 20)
    )
    peer = AutoTokenizer.from_pretrained(flags.tokenizer)
    peer.chat_template = training_template()
    encode_batch = encoder.tokenizer.backend_tokenizer.encode_batch
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        gc.disable()  # as timeit does
        started = time.perf_counter()
        result = work()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        gc.enable()
        return result

    def run_round() -> tuple[int, int, int]:
        num_tokens = num_same = num_rows = 0
        for start in range(0, last_row, CHUNK_ROWS):
            ids = np.arange(start, min(start + CHUNK_ROWS, last_row), dtype=np.int64)
            payloads = timed("  read", lambda ids=ids: read_rows(manifest, ids))
            conversations = timed(
                "  normalize", lambda rows=payloads: [normalize(row, format_) for row in rows]
            )
            ours = timed("  encode", lambda rows=conversations: _in_steps(encoder, rows))
            messages = [list(conversation.messages) for conversation in conversations]
            theirs = timed(
                "transformers", lambda rows=messages: [_transformers(peer, row) for row in rows]
            )
            texts = [encoder.tokenizer.apply_chat_template(row, tokenize=False) for row in messages]
            bare = timed(
                "encode_batch", lambda rows=texts: encode_batch(rows, add_special_tokens=False)
            )
            assert [row.input_ids.tolist() for row in ours] == [row.ids for row in bare], (
                "other ids"
            )
            num_tokens += sum(len(row.input_ids) for row in ours)
            num_same += sum(_same_mask(row, other) for row, other in zip(ours, theirs, strict=True))
            num_rows += len(ours)
        return num_rows, num_tokens, num_same

    best: dict[str, float] = {}
    for _ in range(flags.rounds):
        seconds.clear()
        num_rows, num_tokens, num_same = run_round()
        seconds["ours"] = sum(seconds[name] for name in seconds if name.startswith("  "))
        best = {name: min(value, best.get(name, value)) for name, value in seconds.items()}
    _print(best, num_rows, num_tokens, num_same, encoder.certificate.engine)
    ratio = best["transformers"] / best["ours"]
    bars = [Bar("times the transformers path", ratio, flags.min_ratio, is_lower=True)]
    print_bars(bars, Console(width=100))
    if flags.check:
        exit_where_missed(bars)


def _in_steps(encoder: Encoder, rows: Sequence[Conversation]) -> list[Encoded]:
    """As the loader does it: the rows of a step together."""
    outcomes: list[Any] = []
    for start in range(0, len(rows), STEP_ROWS):
        outcomes += encoder.encode_all(rows[start : start + STEP_ROWS])
    return outcomes


def _transformers(tokenizer: Any, messages: Sequence[Any]) -> tuple[list[int], list[int]]:
    row = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return row["input_ids"], row["assistant_masks"]


def _same_mask(ours: Encoded, theirs: tuple[list[int], list[int]]) -> bool:
    """Equal ids; and our mask within theirs, which has the newline behind a terminator and empty
    think blocks, too.
    """
    ids, mask = theirs
    return ours.input_ids.tolist() == ids and bool(np.all(ours.loss_mask <= np.array(mask)))


def _print(
    best: dict[str, float], num_rows: int, num_tokens: int, num_same: int, engine: str
) -> None:
    table = Table(
        title=f"{num_rows:,} rows, {num_tokens:,} tokens, one core ({engine})", title_justify="left"
    )
    table.add_column("path")
    for column in ("us a row", "rows/s", "tokens/s", "times transformers"):
        table.add_column(column, justify="right")
    for name in ("ours", "  read", "  normalize", "  encode", "encode_batch", "transformers"):
        table.add_row(
            name,
            f"{best[name] / num_rows * 1e6:.1f}",
            f"{num_rows / best[name]:,.0f}",
            f"{num_tokens / best[name]:,.0f}",
            f"{best['transformers'] / best[name]:.1f}",
        )
    console = Console(width=100)
    console.print(table)
    console.print(
        f"same ids as theirs, and our mask within theirs: {num_same:,} of {num_rows:,} rows. In the others, which have "
        "several turns, their training template keeps an empty think block that Qwen3's own leaves out."
    )


if __name__ == "__main__":
    main()
