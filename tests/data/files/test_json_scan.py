"""Byte ranges of rows: against json itself, at every place where a buffer can be cut."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from miles.data.files import decompress, json_scan, json_values
from miles.data.files.json_layout import Layout
from miles.data.files.json_values import ValueScanner
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


@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 64])
def test_values_wherever_the_chunks_are_cut(chunk_bytes: int) -> None:
    values = [json.dumps(row, ensure_ascii=False, indent=1).encode() for row in ROWS]
    held = b'{"n": [1, {}], "\xc3\xa9": ' + b"[" + b",\n".join(values) + b',] , "o": "]"}'
    for layout, key, content in (
        (Layout.VALUES, "", b" \n".join(values)),
        (Layout.VALUES, "", b",\r".join(values) + b",\n"),
        (Layout.WRAPPED, "\u00e9", held),
    ):
        chunks = [content[at : at + chunk_bytes] for at in range(0, len(content), chunk_bytes)]
        places = ValueScanner("x.json", iter(chunks), 0).rows(layout, key)
        assert [content[begin:end] for begin, end in places] == values


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),  # also those that JSON does not have
        st.text('ab"\\{}[],: \n\u00e9\ud800', max_size=4),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("ab"), inner)),
    max_leaves=6,
)


@given(
    rows=st.lists(st.one_of(JSON, st.fixed_dictionaries({"a": JSON, "b": JSON}))),
    comma=st.sampled_from([",", ", ", "\n ,\n", ",\r\n  "]),
    is_ascii=st.booleans(),
    chunk_bytes=st.sampled_from([1, 9, 40, 1000]),
)
def test_many_rows_at_once_are_the_same_rows(
    rows: list[Any], comma: str, is_ascii: bool, chunk_bytes: int
) -> None:
    texts = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    content = f"[{comma.join(texts)}]".encode("utf-8", "surrogatepass")

    def places() -> list[tuple[int, int]]:
        chunks = [content[at : at + chunk_bytes] for at in range(0, len(content), chunk_bytes)]
        return list(ValueScanner("x.json", iter(chunks), 0).rows(Layout.ARRAY))

    def pieces() -> list[bytes]:
        return json_scan.split_rows("json", content[1:-1])

    found, split = places(), pieces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "raw_values", lambda text: None)
        patch.setattr(json_scan, "raw_values", lambda text: None)
        assert (found, split) == (places(), pieces())
    assert split == [text.encode("utf-8", "surrogatepass") for text in texts]
    assert split == [content[begin:end] for begin, end in found]


def test_most_rows_of_an_array_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows hold lists of objects, whose borders look like theirs."""
    row = {"turns": [{"from": "a"}, {"from": "b"}], "note": None}
    content = json.dumps([row] * 1000).encode()
    decoded = []
    find_one = ValueScanner._row
    monkeypatch.setattr(ValueScanner, "_row", lambda self: decoded.append(1) or find_one(self))
    chunks = iter([content[:30_000], content[30_000:]])
    assert len(list(ValueScanner("x.json", chunks, 0).rows(Layout.ARRAY))) == 1000
    assert len(decoded) < 6

    chunks = iter([content[:30_000], content[30_000:-1], b', {"turns": oops}]'])
    with pytest.raises(SourceError, match=r"in row 1000 \(counting from 0\)"):
        list(ValueScanner("x.json", chunks, 0).rows(Layout.ARRAY))


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


@pytest.mark.parametrize("chunk_bytes", [3, 4 << 20])
def test_a_broken_value_names_its_line(chunk_bytes: int) -> None:
    content = b'{"a":\n 1}\n\n' * 20 + b'{"a":\n nope}'
    chunks = [content[at : at + chunk_bytes] for at in range(0, len(content), chunk_bytes)]
    with pytest.raises(SourceError, match=r"\(line 63\): .* in row 20 .* byte 220 \(line 62\)"):
        list(ValueScanner("x.json", iter(chunks), 0, num_lines=1).rows(Layout.VALUES))


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


PACK = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
SUFFIXES = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2", "xz": ".xz"}


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("buffer_bytes", [3, 4 << 20])
def test_compressed_in_several_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, buffer_bytes: int
) -> None:
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", buffer_bytes)
    halves = [b'{"a": 1}\n{"a"', b": 2}\n"]
    padding = b"\0" * 4 if compression == "xz" else b""
    path = tmp_path / f"rows.jsonl{SUFFIXES[compression]}"
    path.write_bytes(padding.join(map(PACK[compression], halves)) + padding)
    assert rows_in(path, compression) == ("jsonl", [b'{"a": 1}', b'{"a": 2}'])


@pytest.mark.parametrize("compression", PACK)
def test_truncated_and_false_compression(tmp_path: Path, compression: str) -> None:
    content = b"".join(b'{"a": %d}\n' % i for i in range(50_000))
    packed = PACK[compression](content)
    path = tmp_path / f"rows.jsonl{SUFFIXES[compression]}"
    for broken in (packed[: len(packed) // 2], packed[:-1], packed + b"junk"):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=f"{path.name}: damaged or cut off .*Copy or write"):
            json_scan.scan(str(path), compression)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(SourceError, match=f"{path.name}: not an? {compression} file, as its name"):
        json_scan.scan(str(path), compression)


def test_xz_that_needs_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "MAX_WINDOW_BYTES", 1 << 20)
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"a": 1}'))
    with pytest.raises(SourceError, match=r"more memory than that: at most 1 MiB .*xz -6"):
        json_scan.scan(str(path), "xz")
