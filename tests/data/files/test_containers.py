"""JSON as people keep it: read, or refused with the file, the place, the cause and the remedy."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard

from miles.data.config import RowFormat, SourceConfig
from miles.data.files import json_layout, json_scan
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from tests.support.row_cases import refusal, take

TREES = [
    [("user", f"Name a tree, number {row}."), ("assistant", f"Tree {row} is a larch.")]
    for row in range(3)
]


@pytest.mark.parametrize(
    "name",
    [
        "array_in.jsonl",
        "array_trailing_comma.json",
        "cr_only.jsonl",
        "crlf.jsonl",
        "many_pretty.json",
        "members.jsonl.gz",
        "trailing_comma.jsonl",
        "wrapped.json",
        "wrapped_pretty.json",
    ],
)
def test_rows_in_any_container_are_the_same(name: str) -> None:
    taken = take(f"containers/{name}")
    assert [taken.turns(row) for row in range(len(taken.outcomes))] == TREES


def test_separators_of_unicode_end_no_row() -> None:
    taken = take("containers/u2028.jsonl")
    expected = [("user", "a\u2028b\x85c?"), ("assistant", "d\u2029e")]
    assert [taken.turns(row) for row in range(3)] == [expected] * 3


REFUSED = {
    "containers/latin1.jsonl": (
        r"none of the first 3 rows can be read\. The first one is at line 1, column 46: not UTF-8 "
        r"\(byte 0xf6; it looks like Latin-1 or Windows-1252\)\. Convert it: iconv -f WINDOWS-1252"
    ),
    "containers/array_of_arrays.json": (
        r"at line 1: a list, no object\. .*json\.dumps\(\{\"messages\": row\}\)"
    ),
    "containers/utf16.jsonl": "UTF-16 text; UTF-8 was expected. Convert it: iconv -f UTF-16 ",
    "containers/utf16_array.json": "UTF-16 text; UTF-8 was expected. Convert it: iconv -f UTF-16 ",
    "containers/columns.json": "columns .* where one object a row was expected. .*DataFrame.*orient=.records",
    "containers/pandas_columns.json": "columns, as pandas writes them .* pandas.read_json",
    "not-what-it-says/gz_named.jsonl": "not JSON, but gzip data. Name it gz_named.jsonl.gz",
    "not-what-it-says/lfs.json": "a Git LFS pointer for 123,456 bytes: .* git lfs pull",
    "not-what-it-says/lfs.jsonl": "a Git LFS pointer for 123,456 bytes: .* git lfs pull",
    "not-what-it-says/lfs.parquet": "not a Parquet file, as its name says, but a Git LFS pointer",
    "not-what-it-says/page.jsonl": "an HTML page, such as of a sign-in",
    "shapes-2/long.jsonl.zst": "zstd window has 1,024 MiB, and at most 512 .* zstd -d --long=30",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_named_as_what_it_is(name: str) -> None:
    message = refusal(name)
    assert f"{name}: " in message
    assert re.search(REFUSED[name], message), message


ALIKE = [
    # Rows that would each hold rows, if they were alone.
    ('{"data": [{"b": 1}, {"b": 2}]}\n{"data": [{"b": 1}]}\n', 2),
    ('{\n"data": [{"b": 1}, {"b": 2}]}\n{"data": [{"b": 1}]}\n', 2),
    # Rows that would each be columns.
    ('{"tokens": ["a", "b", "c", "d", "e", "f"], "ids": [1, 2, 3, 4, 5, 6]}\n{"text": "a"}\n', 2),
    # And one that is alone.
    ('{"data": [{"b": 1}, {"b": 2}], "n": 1}\n', 2),
]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"a": 1}{"a": 2} {"a":\n3}', 3),
        ('{"a": 1},\n{"a": 2},\n', 2),
        ('{"a": 1},', 1),
        ('{"a":\n[{"a": 1}]}\n{"a": 2}', 2),
        ('\n\n {"rows": [{"b": 1}, {"b": 2}], "n": [1]}\n', 2),
        ('{"conversations": [{"conversations": [{"from": "human"}]}]}', 1),
        ('{"data": [{"user": "who", "messages": []}, {"user": "me"}]}', 2),
        ('{"rows": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}', 2),
        # One row, whatever it holds.
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', 1),
        ('{"turns": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}', 1),
        ('{"id": 1, "dialogue": [{"user": "a", "assistant": "b"}]}', 1),
        ('{\n"prompt": "a", "completion": "b", "documents": [{"x": 1}, {"x": 2}]}', 1),
        ('{"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}', 1),
        ('{"conversations": ["a", "b"]}', 1),
        *ALIKE,
    ],
)
def test_the_number_of_rows(tmp_path: Path, text: str, rows: int) -> None:
    require_rows(tmp_path / "rows.json", text, rows)


@pytest.mark.parametrize(("text", "rows"), ALIKE)
def test_rows_that_are_longer_than_what_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rows: int
) -> None:
    monkeypatch.setattr(json_layout, "PEEK_BYTES", 24)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 7)
    require_rows(tmp_path / "rows.json", text, rows)


def require_rows(path: Path, text: str, rows: int) -> None:
    """Require that a file has so many rows, and that each is an object."""
    path.write_text(text)
    manifest = build_manifest([SourceConfig("s", (str(path),), RowFormat("text"))])
    assert manifest.num_rows == rows
    assert all(isinstance(json.loads(row), dict) for row in read_rows(manifest, np.arange(rows)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of objects, under 'train', "),
        ('{"a": {"0": 1, "1": 2}, "b": {"0": 3, "1": 4}}', "columns, as pandas writes them"),
        ('{"a": 1}{"a": 2}\n{"a" 3}', r"byte 22 \(line 2\): .* in row 2 .* begins at byte 17"),
        ('{\n"a": 1}\n{\n"a": \'x\'}', r"line 4\).*single quotes, as Python writes a dict"),
        ('[{"n": 1},\n{"data": [{"a": 1}, {"a": None}]}]', r"line 2\): .*None, True or False"),
        ("\n{'a': None}\n{'a': None}", r"line 2, column 2: not JSON .*single quotes.*literal_eval"),
        ('{\n"a": 1,\n}\n{\n"a": 2,\n}\n', r"at line 3, column 1: .*a comma behind the last entry"),
        ('{\n "a": 1\n "b": 2}', r"at line 3, column 2: not JSON \(Expecting ',' delimiter"),
        ("prose, not rows", r"at line 1, column 1: not JSON \(Expecting value\)"),
        ("[" * 100_000, "too deeply"),
        ("\0" * 100, "NUL bytes, as a file has that was cut off"),
        ('<?xml version="1.0"?><Error>', "XML, such as a store's error"),
        ("PK\x03\x04", "a zip archive. Unpack it"),
        ("PAR1", r"a Parquet file. Name it rows\.parquet"),
        ("ARROW1\0\0", r"Arrow data. Name it rows\.arrow"),
        ("BZh91AY", r"bzip2 data. Name it rows\.json\.bz2"),
        ("\xfd7zXZ\x00", r"xz data. Name it rows\.json\.xz"),
        ("\x28\xb5\x2f\xfd", r"zstd data. Name it rows\.json\.zst"),
    ],
)
def test_a_fault_has_a_place_and_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("latin-1"))
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert re.search(said, message), message


def test_utf16_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode("utf-16-be"))
    assert "UTF-16BE text; UTF-8 was expected. Convert it: iconv -f UTF-16BE" in refusal(path)


def test_compression_within_compression(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(zstandard.compress(b'{"text": "a"}')))
    assert "within the gzip data: not JSON, but zstd data: it was packed twice" in refusal(path)
    path.write_bytes(zstandard.compress(b'{"text": "a"}'))
    assert "not a gzip file, as its name says, but zstd data. Name it rows.jsonl.zst" in refusal(
        path
    )


@pytest.mark.parametrize("layout", ["values", "wrapped"])
def test_large_files_are_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(json_layout, "PEEK_BYTES", 64 << 10)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 64 << 10)
    monkeypatch.setattr(json_scan, "GROUP_BYTES", 64 << 10)
    row = json.dumps({"prompt": "a" * 400, "completion": "b" * 400}, indent=1)
    content = (row + "\n") * 8_000
    if layout == "wrapped":
        content = '{"data": [' + ",".join([row] * 8_000) + "]}"
    path = tmp_path / "rows.json"
    path.write_text(content)
    tracemalloc.start()
    try:
        manifest = build_manifest([SourceConfig("s", (str(path),))])
        rows = read_rows(manifest, np.array([7_999, 3]))
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
    assert manifest.num_rows == 8_000
    assert json.loads(rows[0]) == json.loads(row)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.jsonl", "prompt,completion\na,b\n", r"looks like CSV. .* ends in \.csv$"),
        ("x.jsonl", '"prompt"\t"completion"\na\tb\n', r"looks like CSV. .* ends in \.tsv$"),
        ("x.parquet", "prompt,completion\na,b\n", r"CSV text. Name it x\.csv$"),
        ("x.json", '[{"a": 1}]\n[{"a": 2}]', r"line 1: a list of objects, .* jq -c '\.\[\]'"),
        (
            "x.jsonl",
            '{"a":' + "[" * 100_000 + "\n{",
            "nested too deeply. Write such a value as a text",
        ),
        ("x.jsonl.xz", "{}", "not an xz file"),
        ("x.jsonlines", "{}", r"\. Name it x\.jsonl$"),
        ("x.txt", "{}", r"If it holds a JSON object a line, name it x\.jsonl$"),
        ("x.jsonl.gzip", "{}", r"\. Name it x\.jsonl\.gz$"),
        ("x.zip", "PK", "Unpack it, and name what was in it$"),
    ],
)
def test_what_a_file_looks_like_and_its_right_name(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    message = refusal(tmp_path / name)
    assert re.search(said, message), message
    assert "UTF-8" not in message


def test_a_dead_link_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    message = refusal(tmp_path / "a.jsonl")
    assert "it is a link to 'gone.jsonl', which is not there" in message
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in refusal(tmp_path / "empty")
    (tmp_path / "empty/a\nb.zip").touch()
    message = refusal(tmp_path / "empty")
    assert "\n" not in message
    assert message.endswith("b.zip: Unpack it, and name what was in it")
