"""A table's rows are encoded some at a time, whose size is bounded; the table comes out the same."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.stream import row_outcomes, stages
from tests.support.conversations import assistant, user


def chat(number: int) -> list[dict[str, str]]:
    """Return a conversation; some are too long, empty, or of a role that is not known."""
    answer = assistant("word " * (300 if number % 7 == 3 else number % 5))
    if number % 11 == 4:
        answer["role"] = "npc"
    return [user(f"question é {number}"), answer]


@pytest.fixture(scope="module")
def encoder(chatml_tokenizer_folder: Path) -> Encoder:
    config = EncodeConfig(str(chatml_tokenizer_folder), max_sample_tokens=256)
    return Encoder.from_config(config)


def raw_table(folder: Path, lines: list[str], plain: list[Any]) -> tuple[Manifest, pa.Table]:
    """Return the raw steps of rows that are JSON text and of rows that are plain turns."""
    (folder / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"messages": plain}), folder / "b.parquet")
    files = (str(folder / "a.jsonl"), str(folder / "b.parquet"))
    sources = tuple(SourceConfig(name, (file,)) for name, file in zip("ab", files, strict=True))
    manifest = build_manifest(sources)
    order = OrderConfig(batch_size=8, seed=5, window_rows=len(lines) + len(plain))
    plan = stages.make_plan(manifest, DataConfig(sources, order, EncodeConfig("none")))
    (table,) = stages.read_window(manifest, plan, next(iter(plan.windows(0))), 0)
    return manifest, table


@pytest.mark.parametrize("chunk_bytes", [1, 150, 5_000])
def test_chunks_change_nothing(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    lines = [json.dumps({"messages": chat(number), "mood": number}) for number in range(40)]
    lines[::6] = [line.replace('"role"', '"mood": 1, "role"') for line in lines[::6]]
    manifest, table = raw_table(tmp_path, lines, [chat(number) for number in range(40)])
    formats = stages.source_formats(manifest)

    def outcomes() -> list[dict[str, Any]]:
        tables = [
            stages.encode_steps(table, formats, encoder),
            stages.encode_steps(table, formats, encoder, 0.3),
            stages.encode_steps(table, formats, encoder, 0.3, "only"),
            stages.prepare_steps(table, manifest, encoder),
        ]
        timings = ["normalize_seconds", "encode_seconds"]
        return [each.drop_columns(timings).to_pydict() for each in tables[:3]] + [
            tables[3].to_pydict()
        ]

    whole = outcomes()
    kinds = ("rejects", "unused_keys", "source_held_out", "sample_row_ids")
    assert all(any(map(any, whole[1][kind])) for kind in kinds)
    monkeypatch.setattr(row_outcomes, "_CHUNK_BYTES", chunk_bytes)
    assert outcomes() == whole


@pytest.mark.parametrize("is_plain", [True, False])
def test_long_rows_are_held_a_few_at_a_time(
    tmp_path: Path, encoder: Encoder, is_plain: bool
) -> None:
    """48 rows of a megabyte: all together they would be held as text, and as conversations."""
    long = [user("?"), assistant("word " * 200_000)]
    plain = [long] * 47 if is_plain else [chat(1)]
    lines = [json.dumps({"messages": row}) for row in [long] * (1 if is_plain else 47)]
    manifest, table = raw_table(tmp_path, lines, plain)

    tracemalloc.start()
    try:
        encoded = stages.encode_steps(table, stages.source_formats(manifest), encoder)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    reasons = [reject["reason"] for step in encoded["rejects"].to_pylist() for reject in step]
    assert reasons.count("too_long") >= 47
    assert peak_bytes < 32 << 20
