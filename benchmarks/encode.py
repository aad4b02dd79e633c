"""Rows to token ids and masks, one core: ours against transformers' own path, in the same run.

    python benchmarks/encode.py

- ours: rows of a Parquet file -> ids and masks, table by table, by the loader's own stages (read,
  normalize, encode), with each engine that is proven
- by JSON text: the way of rows whose columns are not plain lists of turns, and of all rows before
  they went by tables: each row's JSON text -> conversation, then 128 rows at a time by tiktoken
- encode(): `miles.data.encode()` of one conversation at a time, from messages that are there
- transformers: messages that are there already ->
  `apply_chat_template(return_assistant_tokens_mask=True)` with trl's training template for Qwen3,
  which marks what is trained; `trl` itself takes this path
- encode_batch: texts that are rendered already -> ids, with no mask: the bare tokenizer

Every contender gets the same rows in turn, some thousands at a time, and what counts is the CPU
time of the process, the fastest round of each. The ratios are what is claimed; the absolute numbers
are the machine's.

Engines remember words that they have seen, and real text repeats its words: a warm round is what a
long run has. New text shows what is left without that: the letters of each word are shuffled, anew
in every round, so that nearly no word was seen before. It has nearly twice as many tokens.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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

import miles.data
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, RowFormat, SourceConfig
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.data.rows.normalize import normalize
from miles.data.stream import stages
from miles.data.tokens import engines
from miles.data.types import Encoded

CHUNK_ROWS = 4_096
BATCH_ROWS = 128
MAX_SAMPLE_TOKENS = 1 << 20
ENGINES = ("fastokens", "tiktoken", "tokenizers")
ALONE = "encode(), one at a time"
BY_JSON = "ours, by JSON text, tiktoken"
PEER = "transformers"
_WORD = re.compile(r"[A-Za-z]{3,}")


def main() -> None:
    flags = _parser().parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    contenders = Contenders(flags.tokenizer)
    manifest = _manifest(flags.source)
    if flags.max_rows and flags.max_rows % stages.TABLE_ROWS:
        sys.exit(f"--max-rows must be a multiple of {stages.TABLE_ROWS}")
    num_rows = min(manifest.num_rows, flags.max_rows or manifest.num_rows)
    warm = [contenders.run_round(manifest, num_rows) for _ in range(flags.rounds)]
    with tempfile.TemporaryDirectory() as folder:
        new = []
        for number in range(flags.rounds):
            path = _with_new_words(flags.source, num_rows, number, Path(folder))
            new.append(contenders.run_round(_manifest(path), num_rows))

    bars: list[Bar] = []
    for text, rounds in (("warm", warm), ("new text", new)):
        best = {
            path: min(seconds[path] / tokens for tokens, _, seconds in rounds) * rounds[0][0]
            for path in rounds[0][2]
        }
        _print(text, best, num_rows, rounds[0][0])
        least = {"fastokens": flags.min_ratio_fastokens, "tiktoken": flags.min_ratio}
        for engine in contenders.encoders:
            if engine in least:
                ratio = best[PEER] / best[f"ours, {engine}"]
                name = f"{text}, {engine}: times transformers"
                bars.append(Bar(name, ratio, least[engine], is_lower=True))
        ratio = best[PEER] / best[ALONE]
        bars.append(
            Bar(f"{text}, {ALONE}: times transformers", ratio, flags.min_ratio_alone, is_lower=True)
        )

    console = Console(width=100)
    console.print(
        f"same ids as theirs, and our mask within theirs: {warm[0][1]:,} of {num_rows:,} rows. "
        "In the others, which have several turns, their training template keeps an empty think "
        "block that Qwen3's own leaves out."
    )
    print_bars(bars, console)
    if flags.check:
        exit_where_missed(bars)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sample_flags(parser)
    add_check_flag(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, help="the fastest round of each contender counts"
    )
    parser.add_argument(
        "--max-rows", type=int, help="only this many rows, the first ones: a multiple of 1,024"
    )
    for name, least, what in (
        ("--min-ratio", 10.0, "by tiktoken"),
        ("--min-ratio-fastokens", 15.0, "by fastokens"),
        ("--min-ratio-alone", 6.0, "of one conversation at a time"),
    ):
        parser.add_argument(
            name, type=float, default=least, help=f"of our speed {what} to the transformers path's"
        )
    return parser


class Contenders:
    """Ours with each engine, the path of transformers, and the bare tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        self.encoders = {
            engine: Encoder.from_config(
                EncodeConfig(
                    tokenizer, max_sample_tokens=MAX_SAMPLE_TOKENS, tokenizer_engine=engine
                )
            )
            for engine in ENGINES
            if engine != engines.FASTOKENS or engines.is_installed()
        }
        self._own = AutoTokenizer.from_pretrained(tokenizer)
        self._peer = AutoTokenizer.from_pretrained(tokenizer)
        self._peer.chat_template = training_template()
        self._encode_batch = self._own.backend_tokenizer.encode_batch
        self._seconds: dict[str, float] = {}

    def run_round(self, manifest: Manifest, num_rows: int) -> tuple[int, int, dict[str, float]]:
        """Have each contender encode the first rows, in turn.

        Returns:
            Number of tokens, number of rows with our mask within theirs, seconds of each path.
        """
        self._seconds = {}
        num_tokens = num_same = 0
        for start in range(0, num_rows, CHUNK_ROWS):
            row_ids = np.arange(start, min(start + CHUNK_ROWS, num_rows), dtype=np.int64)
            tokens, same = self._encode(manifest, row_ids)
            num_tokens += tokens
            num_same += same
        return num_tokens, num_same, self._seconds

    def _encode(self, manifest: Manifest, row_ids: np.ndarray) -> tuple[int, int]:
        """Encode rows by every path; assert that all give the same ids."""
        format: RowFormat = manifest.sources[0].format
        rows = [normalize(payload, format) for payload in read_rows(manifest, row_ids)]
        messages = [list(row.messages) for row in rows]
        theirs = self._timed(PEER, lambda: [_transformers(self._peer, row) for row in messages])
        texts = [self._own.apply_chat_template(row, tokenize=False) for row in messages]
        bare = self._timed(
            "encode_batch", lambda: self._encode_batch(texts, add_special_tokens=False)
        )
        expected = np.concatenate([np.array(row.ids, np.int32) for row in bare])

        raw = self._timed("read", lambda: _raw_tables(manifest, row_ids))
        read_seconds = self._last_seconds
        for engine, encoder in self.encoders.items():
            path = f"ours, {engine}"
            self._seconds[path] = self._seconds.get(path, 0.0) + read_seconds
            tables = self._timed(path, lambda encoder=encoder: _encoded(raw, format, encoder))
            ids = _flat(tables, "input_ids")
            mask = _flat(tables, "loss_mask")
            assert np.array_equal(ids, expected), f"{path}: other ids"

        by_json = self._timed(BY_JSON, lambda: self._by_json(manifest, row_ids))
        assert np.array_equal(np.concatenate([row.input_ids for row in by_json]), expected)
        alone = self._timed(ALONE, lambda: [self._alone(row) for row in messages])
        assert np.array_equal(np.concatenate([row.input_ids for row in alone]), expected)
        starts = np.cumsum([0, *[len(row.ids) for row in bare]])
        masks = [mask[begin:end] for begin, end in pairwise(starts)]
        return len(ids), sum(map(_is_within, masks, theirs))

    def _alone(self, messages: Sequence[Any]) -> Encoded:
        return miles.data.encode(messages, self._own, max_sample_tokens=MAX_SAMPLE_TOKENS)

    def _by_json(self, manifest: Manifest, row_ids: np.ndarray) -> list[Encoded]:
        """Encode rows that are read as JSON text, each of which is usable."""
        format: RowFormat = manifest.sources[0].format
        payloads = read_rows(manifest, row_ids)
        encoded: list[Any] = []
        for begin in range(0, len(payloads), BATCH_ROWS):
            texts = payloads[begin : begin + BATCH_ROWS]
            rows = [normalize(text, format) for text in texts]
            encoded += self.encoders[engines.TIKTOKEN].encode_all(rows)
        return encoded

    def _timed(self, path: str, work: Callable[[], Any]) -> Any:
        """Add the CPU seconds of a call to those of a path; return the call's result."""
        gc.collect()
        gc.disable()  # as timeit does
        started = time.process_time()
        result = work()
        self._last_seconds = time.process_time() - started
        self._seconds[path] = self._seconds.get(path, 0.0) + self._last_seconds
        gc.enable()
        return result


def _manifest(source: str | Path) -> Manifest:
    return build_manifest([SourceConfig("rows", (str(source),))])


def _raw_tables(manifest: Manifest, row_ids: np.ndarray) -> list[pa.Table]:
    """Read rows as the loader does: tables of raw steps."""
    order = OrderConfig(batch_size=BATCH_ROWS, window_rows=CHUNK_ROWS)
    sources = (SourceConfig("rows", ("unused",)),)
    plan = stages.make_plan(manifest, DataConfig(sources, order, EncodeConfig("unused")))
    ref = next(ref for ref in plan.windows(0) if ref.first_step * BATCH_ROWS == row_ids[0])
    num_tables = -(-len(row_ids) // stages.TABLE_ROWS)
    return list(islice(stages.read_window(manifest, plan, ref, 0), num_tables))


def _encoded(raw: Sequence[pa.Table], format: RowFormat, encoder: Encoder) -> list[pa.Table]:
    return [stages.encode_steps(table, [format], encoder) for table in raw]


def _flat(tables: Sequence[pa.Table], name: str) -> np.ndarray:
    """Return the values of a list column of some tables, end to end."""
    chunks = [chunk for table in tables for chunk in table[name].chunks]
    return np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])


def _with_new_words(source: str, num_rows: int, seed: int, folder: Path) -> Path:
    """Write the first rows with the letters of each word shuffled; return the file."""
    rng = np.random.default_rng(seed)

    def shuffled(word: re.Match[str]) -> str:
        letters = list(word[0])
        rng.shuffle(letters)
        return "".join(letters)

    rows = pq.read_table(source).slice(0, num_rows).to_pylist()
    for row in rows:
        for turn in row["conversations"]:
            turn["value"] = _WORD.sub(shuffled, turn["value"])
    path = folder / f"new_{seed}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _transformers(tokenizer: Any, messages: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Return ids and mask by transformers' own path."""
    row = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return row["input_ids"], row["assistant_masks"]


def _is_within(ours: np.ndarray, theirs: tuple[list[int], list[int]]) -> bool:
    """Return whether our mask has as many tokens as theirs, and lies within it.

    Theirs has the newline behind a terminator and empty think blocks, too.
    """
    _, mask = theirs
    return len(ours) == len(mask) and bool(np.all(ours <= np.array(mask)))


def _print(text: str, best: Mapping[str, float], num_rows: int, num_tokens: int) -> None:
    table = Table(
        title=f"{text}: {num_rows:,} rows, {num_tokens:,} tokens, one core", title_justify="left"
    )
    table.add_column("path")
    for column in ("us a row", "rows/s", "tokens/s", "times transformers"):
        table.add_column(column, justify="right")
    for name, seconds in sorted(best.items(), key=lambda item: item[1]):
        table.add_row(
            name,
            f"{seconds / num_rows * 1e6:.1f}",
            f"{num_rows / seconds:,.0f}",
            f"{num_tokens / seconds:,.0f}",
            f"{best[PEER] / seconds:.1f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
