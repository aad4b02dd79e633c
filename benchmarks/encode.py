"""Rows to token ids and masks, one core: ours against transformers' own path, in the same run.

    python benchmarks/encode.py

- ours: rows of a Parquet file -> conversation -> ids and mask, as the loader does it
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
from miles.data.files.raw_rows import RawRows
from miles.data.files.read import read_raw_rows
from miles.data.stream.row_outcomes import normalize_rows
from miles.data.stream.stages import TABLE_ROWS
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
    parser.add_argument("--max-rows", type=int, help="only this many rows, the first ones")
    parser.add_argument(
        "--min-ratio", type=float, default=4.0, help="of our speed to the transformers path's"
    )
    flags = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    contenders = Contenders(flags.source, flags.tokenizer)
    num_rows = min(contenders.manifest.num_rows, flags.max_rows or contenders.manifest.num_rows)
    rounds = [contenders.run_round(num_rows) for _ in range(flags.rounds)]
    best = {path: min(seconds[path] for _, _, seconds in rounds) for path in rounds[0][2]}

    num_tokens, num_same, _ = rounds[0]
    _print(best, num_rows, num_tokens, num_same, contenders.encoder.certificate.engine)
    ratio = best["transformers"] / best["ours"]
    bars = [Bar("times the transformers path", ratio, flags.min_ratio, is_lower=True)]
    print_bars(bars, Console(width=100))
    if flags.check:
        exit_where_missed(bars)


class Contenders:
    """Ours, the path of transformers, and the bare tokenizer, over the same rows."""

    def __init__(self, source: str, tokenizer: str) -> None:
        self.manifest = build_manifest([SourceConfig("rows", (source,))])
        self.encoder = Encoder.from_config(
            EncodeConfig(tokenizer=tokenizer, max_sample_tokens=1 << 20)
        )
        self._format: RowFormat = self.manifest.sources[0].format
        self._peer = AutoTokenizer.from_pretrained(tokenizer)
        self._peer.chat_template = training_template()
        self._encode_batch = self.encoder.tokenizer.backend_tokenizer.encode_batch
        self._seconds: dict[str, float] = {}

    def run_round(self, num_rows: int) -> tuple[int, int, dict[str, float]]:
        """Have each contender encode the first rows, in turn.

        Returns:
            Number of tokens, number of rows with our mask within theirs, seconds of each path.
        """
        self._seconds = {}
        num_tokens = num_same = 0
        for start in range(0, num_rows, CHUNK_ROWS):
            row_ids = np.arange(start, min(start + CHUNK_ROWS, num_rows), dtype=np.int64)
            ours, theirs = self._encode(row_ids)
            num_tokens += sum(len(row.input_ids) for row in ours)
            num_same += sum(_same_mask(row, peer) for row, peer in zip(ours, theirs, strict=True))

        ours_seconds = sum(self._seconds[path] for path in ("  read", "  normalize", "  encode"))
        return num_tokens, num_same, {**self._seconds, "ours": ours_seconds}

    def _encode(self, row_ids: np.ndarray) -> tuple[list[Encoded], list[Any]]:
        """Encode rows by every path; assert that all give the same ids."""
        counts = np.diff(np.append(np.arange(0, len(row_ids), TABLE_ROWS), len(row_ids))).tolist()
        parts = self._timed("  read", lambda: list(read_raw_rows(self.manifest, row_ids, counts)))
        conversations = self._timed("  normalize", lambda: self._normalized(parts))
        ours = self._timed("  encode", lambda: _in_steps(self.encoder, conversations))

        messages = [list(conversation.messages) for conversation in conversations]
        theirs = self._timed(
            "transformers", lambda: [_transformers(self._peer, row) for row in messages]
        )

        render = self.encoder.tokenizer.apply_chat_template
        texts = [render(row, tokenize=False) for row in messages]
        bare = self._timed(
            "encode_batch", lambda: self._encode_batch(texts, add_special_tokens=False)
        )
        assert [row.input_ids.tolist() for row in ours] == [row.ids for row in bare], "other ids"
        return ours, theirs

    def _normalized(self, parts: Sequence[RawRows]) -> list[Any]:
        """Normalize the rows of tables, as the loader does it."""
        rows: list[Any] = []
        for part in parts:
            rows += normalize_rows(part, np.zeros(len(part), np.int32), [self._format])
        return rows

    def _timed(self, path: str, work: Callable[[], Any]) -> Any:
        """Add the seconds of a call to those of a path; return the call's result."""
        gc.collect()
        gc.disable()  # as timeit does
        started = time.perf_counter()
        result = work()
        self._seconds[path] = self._seconds.get(path, 0.0) + time.perf_counter() - started
        gc.enable()
        return result


def _in_steps(encoder: Encoder, rows: Sequence[Conversation]) -> list[Encoded]:
    """Encode the rows of a step together, as the loader does."""
    outcomes: list[Any] = []
    for start in range(0, len(rows), STEP_ROWS):
        outcomes += encoder.encode_all(rows[start : start + STEP_ROWS])
    return outcomes


def _transformers(tokenizer: Any, messages: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Return ids and mask by transformers' own path."""
    row = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return row["input_ids"], row["assistant_masks"]


def _same_mask(ours: Encoded, theirs: tuple[list[int], list[int]]) -> bool:
    """Return whether the ids are equal and our mask lies within theirs.

    Theirs has the newline behind a terminator and empty think blocks, too.
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
        f"same ids as theirs, and our mask within theirs: {num_same:,} of {num_rows:,} rows. "
        "In the others, which have several turns, their training template keeps an empty think "
        "block that Qwen3's own leaves out."
    )


if __name__ == "__main__":
    main()
