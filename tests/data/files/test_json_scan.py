"""Byte ranges of rows: against json itself, at every place where a buffer can be cut."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from miles.data.files import json_scan, json_values
from miles.errors import SourceError

ROWS = [
    {"a": "plain"},
    {"a": "ключ ☃ 𝄞 中文", "b": [1, -2.5e10, True, None]},
    {"a": 'quote " backslash \\ brace } bracket ] comma , newline \n'},
    {"nested": {"x": [[], {}, [{}]]}},
    {"a": "😀", "\u00e9": "\u007f"},
]


def rows_in(path: Path, compression: str | None = None) -> tuple[str, list[bytes]]:
    kind, extents = json_scan.scan(str(path), compression)
    content = b"".join(json_scan.read_chunks(str(path), compression))
    rows = []
    for num_rows, offset, length in extents:
        block = json_scan.split_rows(kind, content[offset : offset + length])
        assert len(block) == num_rows
        rows += block
    return kind, rows


@pytest.mark.parametrize("buffer_bytes", [1, 2, 3, 7, 64, 4 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_array_wherever_the_buffer_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(json_scan, "GROUP_ROWS", 2)
    elements = [*ROWS, 12345, -1.5e-7, True, "text", None]
    path = tmp_path / "rows.json"
    path.write_text(
        " \n" + json.dumps(elements, ensure_ascii=False, indent=indent) + "\n ", encoding="utf-8"
    )
    kind, rows = rows_in(path)
    assert kind == "json"
    assert [json.loads(row) for row in rows] == elements
    assert [extent[0] for extent in json_scan.scan(str(path), None)[1]] == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("buffer_bytes", [1, 5, 4 << 20])
@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_lines_wherever_the_buffer_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int, end: str
) -> None:
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", buffer_bytes)
    path = tmp_path / "rows.jsonl"
    text = "\r\n \n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + end
    path.write_bytes(text.encode())
    kind, rows = rows_in(path)
    assert kind == "jsonl"
    assert [json.loads(row) for row in rows] == ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_the_first_byte_says_what_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('\n [{"a": 1}]')
    assert rows_in(path) == ("json", [b'{"a": 1}'])
    path.write_text('\n{"a": 1}\n{"a": 2}')
    assert rows_in(path) == ("jsonl", [b'{"a": 1}', b'{"a": 2}'])


@pytest.mark.parametrize(
    "text", ['[1, 2]\n{"a": 1}\n', '\n[{"a": 1}]\n\n[2]', '[]\r\n{"a": "]"}\r\n']
)
def test_lines_may_begin_with_a_list(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode())
    kind, rows = rows_in(path)
    assert kind == "jsonl"
    assert [json.loads(row) for row in rows] == [
        json.loads(line) for line in text.split("\n") if line.strip()
    ]


@pytest.mark.parametrize("text", ['[{"a": 1}]', '{"a": 1}\n'])
def test_byte_order_mark(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert rows_in(path)[1] == [b'{"a": 1}']


def test_malformed_lines_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": \nnot json\n\xff\xfe\n{"a": 1}\n')
    assert rows_in(path)[1] == [b'{"a": ', b"not json", b"\xff\xfe", b'{"a": 1}']


def test_groups_end_by_rows_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 2_500)
    assert [extent[0] for extent in json_scan.scan(str(path), None)[1]] == [1_000, 1_000, 500]
    path.write_text(("x" * (1 << 20) + "\n") * 9)
    assert [extent[0] for extent in json_scan.scan(str(path), None)[1]] == [4, 4, 1]


@pytest.mark.parametrize(
    ("text", "offset", "what"),
    [
        ('[{"a": 1}, {"a" 2}]', 16, "delimiter"),
        ('[{"a": 1}, {"a": nope}]', 17, "Expecting value"),
        ('[{"é": 1}, {"a" 2}]', 17, "delimiter"),
        ('[{"a": 1} {"a": 2}]', 10, "comma"),
        ('[{"a": 1},,{}]', 10, "Expecting value"),
        ("[,]", 1, "Expecting value"),
        ('[{"a": 1}', 9, "ends before"),
        ('[{"a": "1', 7, "Unterminated"),
        ("[", 1, "ends before"),
        ('[{"a": 1}] []', 11, "after the array"),
        ('[{"a": "\n"}]', 8, "control character"),
    ],
)
@pytest.mark.parametrize("buffer_bytes", [3, 4 << 20])
def test_a_broken_array_names_its_byte(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    offset: int,
    what: str,
    buffer_bytes: int,
) -> None:
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", buffer_bytes)
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=what) as caught:
        json_scan.scan(str(path), None)
    assert f"{path}: broken JSON at byte {offset} (line 1):" in str(caught.value)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of the file was read, chunk by chunk of 1,000 bytes."""
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 1_000)
    sizes: list[int] = []
    original = json_scan.read_chunks

    def counting(url: str, compression: str | None) -> Iterator[bytes]:
        for chunk in original(url, compression):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(json_scan, "read_chunks", counting)
    return sizes


def test_a_late_break_is_found_at_once(tmp_path: Path, bytes_read: list[int]) -> None:
    """The rest of the file is not read in the hope that it mends the element."""
    path = tmp_path / "rows.json"
    element = json.dumps({"a": "x" * 90})
    path.write_text("[" + f"{element}, " * 100 + '{"a" "b"}, ' + f"{element}, " * 10_000 + "1]")
    with pytest.raises(SourceError, match=f"byte {1 + 100 * (len(element) + 2) + 5} "):
        json_scan.scan(str(path), None)
    assert sum(bytes_read) < 20_000


def test_an_unclosed_element_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_read: list[int]
) -> None:
    monkeypatch.setattr(json_values, "MAX_ELEMENT_BYTES", 10_000)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": [' + '{"b": 1}, ' * 100_000)
    with pytest.raises(SourceError, match="broken JSON at byte"):
        json_scan.scan(str(path), None)
    assert sum(bytes_read) < 50_000


def test_nesting_that_python_cannot_follow(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[" + "[" * 200_000 + "]" * 200_001)
    with pytest.raises(SourceError, match="too deeply"):
        json_scan.scan(str(path), None)


def test_compressed_in_several_members(tmp_path: Path) -> None:
    halves = [b'{"a": 1}\n{"a"', b": 2}\n"]
    zipped, framed = tmp_path / "rows.jsonl.gz", tmp_path / "rows.jsonl.zst"
    zipped.write_bytes(b"".join(gzip.compress(half) for half in halves))
    framed.write_bytes(b"".join(zstandard.compress(half) for half in halves))
    assert rows_in(zipped, "gzip") == ("jsonl", [b'{"a": 1}', b'{"a": 2}'])
    assert rows_in(framed, "zstd") == ("jsonl", [b'{"a": 1}', b'{"a": 2}'])


@pytest.mark.parametrize(
    ("name", "compression"), [("rows.jsonl.gz", "gzip"), ("rows.jsonl.zst", "zstd")]
)
def test_truncated_and_false_compression(tmp_path: Path, name: str, compression: str) -> None:
    content = b"".join(b'{"a": %d}\n' % i for i in range(50_000))
    packed = gzip.compress(content) if compression == "gzip" else zstandard.compress(content)
    path = tmp_path / name
    for broken in (packed[: len(packed) // 2], packed[:-1], b"not compressed at all"):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=name):
            json_scan.scan(str(path), compression)
