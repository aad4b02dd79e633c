"""The peer of the stream: it tokenises as Miles does, a batch at a time, in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from _common import training_template
from transformers import AutoTokenizer

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def batch_by_batch(
    paths: Sequence[str], tokenizer_folder: str, batch_size: int, num_rows: int
) -> dict[str, float]:
    """Tokenise rows one by one, with transformers' template and mask.

    The template is trl's for Qwen3, which marks what is trained.

    Returns:
        Rows and tokens, the seconds up to the first batch, and the seconds of all batches.
    """
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = training_template()
    begun = time.monotonic()

    rows = (row for path in paths for row in _parquet_rows(path, batch_size))
    done_rows = done_tokens = 0
    while done_rows < num_rows:
        batch = list(islice(rows, min(batch_size, num_rows - done_rows)))
        if not batch:
            break
        encoded = [_encode(tokenizer, row) for row in batch]
        ids = np.concatenate([np.array(row["input_ids"], np.int32) for row in encoded])
        mask = np.concatenate([np.array(row["assistant_masks"], np.uint8) for row in encoded])
        assert len(ids) == len(mask)
        done_rows += len(batch)
        done_tokens += len(ids)
    return {
        "num_rows": done_rows,
        "num_tokens": done_tokens,
        "start_up_seconds": begun - started,
        "batches_seconds": time.monotonic() - begun,
    }


def _encode(tokenizer: Any, row: dict[str, Any]) -> Any:
    """Return token ids and mask of a row."""
    messages = [
        {"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
    ]
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )


def _parquet_rows(path: str, batch_rows: int) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(batch_rows, columns=["conversations"]):
        yield from batch.to_pylist()
