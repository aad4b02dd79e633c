"""Small files of rows, of every kind that Miles reads."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

NUM_ROWS = 57

KINDS = [
    "parquet",
    "lines",
    "array",
    "values",
    "wrapped",
    "lines.gz",
    "lines.zst",
    "lines.bz2",
    "lines.xz",
    "array.zst",
]


def content_of(kind: str, tmp_path: Path) -> tuple[str, bytes]:
    """Return a file name and the content of a file of a kind: `NUM_ROWS` numbered rows.

    Args:
        kind: of `KINDS`.
        tmp_path: a folder for what is written on the way.
    """
    rows = [{"i": i, "text": "é中😀" * (i % 5)} for i in range(NUM_ROWS)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    array = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    values = "\n".join(json.dumps(row, ensure_ascii=False, indent=1) for row in rows).encode()
    wrapped = json.dumps({"n": 1, "data": rows, "o": {}}, ensure_ascii=False, indent=1).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made", row_group_size=10)
        return "x.parquet", (tmp_path / "made").read_bytes()
    return {
        "lines": ("x.jsonl", lines),
        "array": ("x.json", array),
        "values": ("x.json", values),
        "wrapped": ("x.json", wrapped),
        "lines.gz": ("x.jsonl.gz", gzip.compress(lines)),
        "lines.zst": ("x.jsonl.zst", zstandard.compress(lines)),
        "lines.bz2": ("x.jsonl.bz2", bz2.compress(lines)),
        "lines.xz": ("x.jsonl.xz", lzma.compress(lines)),
        "array.zst": ("x.json.zst", zstandard.compress(array)),
    }[kind]


def random_conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of one to three turns; every 29th has no message and is rejected."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices("abcdefgé", k=draw.randint(1, 9)))

    def text() -> str:
        return " ".join(word() for _ in range(draw.randint(1, 30)))

    conversations = []
    for number in range(count):
        messages = []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text()})
            messages.append({"role": "assistant", "content": text()})
        conversations.append({"messages": [] if number % 29 == 7 else messages})
    return conversations


def json_lines(rows: Iterable[Any]) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_conversations(path: Path, rows: Sequence[dict[str, Any]], group_rows: int) -> None:
    """Write rows of `messages` as Parquet."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("messages", pa.list_(message))])
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, group_rows)
