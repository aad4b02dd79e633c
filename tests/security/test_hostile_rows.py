"""Rows and files that want to take a loader's memory or time: dropped, and named."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miles.data.config import RowFormat, SourceConfig
from miles.data.files import json_blocks, json_scan, raw_values
from miles.data.files.json_blocks import without_oversized
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.rows import normalize as rows
from miles.data.rows.normalize import normalize
from miles.data.types import RowRejected
from miles.errors import MilesError, SourceError
from tests.support.bad_rows import GOOD, chat, config_of, line, run, run_lines
from tests.support.fault_table import NOTHING, observed

LIMIT_BYTES = 2000


def write(path: Path, content: bytes) -> Path:
    """Write a file, compressed as its name says."""
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_blocks, rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", LIMIT_BYTES)
    for module in (raw_values, rows):
        monkeypatch.setattr(module, "MAX_ROW_VALUES", LIMIT_BYTES // 4)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 700)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.json"])
def test_an_oversized_row_is_dropped_by_its_size(
    name: str, tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    """It may be the first, the last or in the middle; the others are trained."""
    large = line(chat("x" * LIMIT_BYTES))
    lines = [large, GOOD, GOOD, large, GOOD, large]
    content = b"\n".join(lines)
    if name == "rows.json":
        content = b"[" + b",\n".join(lines) + b"]"
    got = run(config_of([write(tmp_path / name, content)], chatml_tokenizer_folder), tmp_path)
    assert got.dropped == [(0, "too_long"), (3, "too_long"), (5, "too_long")]
    assert got.trained == [1, 2, 4]
    detail = json.loads(got.text.splitlines()[0])["detail"]
    assert detail == f"{len(large):,} bytes of JSON, at most {LIMIT_BYTES:,}"
    observed("row of over 128 MiB", detail, "bytes of JSON", NOTHING)


@pytest.mark.usefixtures("small_limit")
def test_a_row_at_the_limit_is_trained(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    for num_bytes, is_trained in ((LIMIT_BYTES, True), (LIMIT_BYTES + 1, False)):
        row = line(chat("x", padding=""))
        row = line(chat("x", padding="x" * (num_bytes - len(row))))
        got = run_lines([GOOD, row], tmp_path, chatml_tokenizer_folder)
        assert len(row) == num_bytes
        assert (1 in got.trained) == is_trained


@pytest.mark.usefixtures("small_limit")
def test_blank_lines_of_any_size_are_no_rows() -> None:
    blank = b" " * LIMIT_BYTES + b"\t"
    pieces = [GOOD + b"\n", blank[:99], blank[99:], b"\n" + GOOD]
    assert json_scan.split_rows("jsonl", without_oversized(pieces)) == [GOOD, GOOD]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("value", ["[" + "[]," * 400 + "[]]", "[" + "0," * 600 + "0]"])
def test_a_row_of_millions_of_values_is_not_decoded(value: str) -> None:
    payload = GOOD[:-1] + b', "other": ' + value.encode() + b"}"
    assert len(payload) < LIMIT_BYTES
    with pytest.raises(RowRejected, match="malformed_json: lists and objects of more than 500"):
        normalize(payload)


LONG_NUMBERS = ["1e999999999", "9" * 4000, "0." + "1" * 1_000_000, "-" + "1" * 300 + "e-999999"]


@pytest.mark.parametrize("number", LONG_NUMBERS)
def test_long_numbers_cost_nothing(number: str) -> None:
    assert normalize(GOOD[:-1] + f', "score": {number}}}'.encode()).messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": [' + '{"role": "user", "content": ' * 5_000, "malformed_json"),
        ('{"messages": ' + "9" * 1_000_000 + "}", "malformed_json"),
        ('{"messages": [{"role": "user", "content": "\\ud800\\u0000"}]}', "nothing_to_train"),
        ('{"a": 1, ' + '"messages": [], ' * 100_000 + '"b": 1}', "no_messages"),
    ],
)
def test_rows_that_attack_the_parser_are_dropped(row: str, reason: str) -> None:
    with pytest.raises(RowRejected, match=reason):
        normalize(row.encode())


def test_tens_of_thousands_of_turns_end(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """One row; what it comes to is decided in seconds."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 20_000
    got = run_lines([GOOD, line({"messages": turns}), GOOD], tmp_path, chatml_tokenizer_folder)
    assert got.trained == [0, 2]
    assert got.dropped[0][1] in ("too_long", "template_error", "unlocatable_turn")


INJECTED = [
    "{{ ''.__class__.__mro__ }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{% raw %}{{ 7 * 7 }}",
    "{%- include '/etc/passwd' -%}",
    "${7*7} #{7*7} <%= 7*7 %>",
]


@pytest.mark.parametrize("text", INJECTED)
def test_a_template_in_a_row_is_text(text: str, chatml_tokenizer: Any) -> None:
    from miles.data.encoding.encoder import encode

    encoded = encode(chat(text, question=text)["messages"], chatml_tokenizer)
    shown = chatml_tokenizer.decode(encoded.input_ids)
    assert shown.count(text) == 2
    assert "49" not in shown


# Compressed files and Parquet


def rle_frame(num_bytes: int, character: bytes = b" ") -> bytes:
    """Return a zstd frame of one character, in blocks of four bytes for 128 KiB (RFC 8878)."""
    block = (128 << 10) << 3 | 0b010
    blocks = [block] * (num_bytes >> 17)
    blocks[-1] |= 1  # the last one
    body = b"".join(header.to_bytes(3, "little") + character for header in blocks)
    return b"\x28\xb5\x2f\xfd" + b"\x00" + b"\x38" + body


def test_a_zstd_bomb_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """16 KB that come to 512 MiB: blank bytes, a row, and one character without end."""
    size = 256 << 20
    assert zstandard.ZstdDecompressor().decompressobj().decompress(rle_frame(1 << 18)) == b" " * (
        1 << 18
    )
    frames = [rle_frame(size), zstandard.compress(b"\n" + GOOD + b"\n"), rle_frame(size, b"x")]
    file = tmp_path / "rows.jsonl.zst"
    file.write_bytes(b"".join(frames))
    assert file.stat().st_size < 20_000

    tracemalloc.start()
    try:
        manifest = build_manifest([SourceConfig("s", (str(file),), RowFormat("messages"))])
        good, large = read_rows(manifest, np.arange(2))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert good == GOOD
    with pytest.raises(RowRejected, match=f"too_long: {size:,} bytes of JSON"):
        normalize(large)
    assert peak_bytes < size


def parquet_bytes(num_rows: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"messages": [chat("4")["messages"]] * num_rows}), file)
    return file.getvalue()


def rows_of(file: Path) -> int:
    """Return how many rows of a file are read, all of those that it says it has."""
    manifest = build_manifest([SourceConfig("s", (str(file),), RowFormat("messages"))])
    wanted = np.unique([0, manifest.num_rows - 1])
    return len(read_rows(manifest, wanted))


@pytest.mark.parametrize("count", [b"\xfe\x7f", b"\x99\x01"])
def test_a_parquet_footer_that_lies_is_named(count: bytes, tmp_path: Path) -> None:
    """It says 8191 and -77 rows, of 77 (154 in zigzag)."""
    content = parquet_bytes(77)
    assert content.count(b"\x9a\x01") > 2
    file = tmp_path / "rows.parquet"
    file.write_bytes(content.replace(b"\x9a\x01", count))
    with pytest.raises(SourceError, match=r"rows\.parquet: "):
        rows_of(file)


def test_broken_parquet_footers_are_named(tmp_path: Path, draw: Random) -> None:
    """Bytes changed at random: the rows are read, or an error of ours names the file."""
    content = parquet_bytes(9)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    file = tmp_path / "rows.parquet"
    num_refused = 0
    for _ in range(100):
        broken = bytearray(content)
        for at in draw.sample(range(footer, len(content) - 8), 3):
            broken[at] = draw.randrange(256)
        file.write_bytes(broken)
        try:
            rows_of(file)
        except MilesError:
            num_refused += 1
    assert num_refused > 30
