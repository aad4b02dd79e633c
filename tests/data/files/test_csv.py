"""CSV and TSV: rows as a CSV library reads them, however they are cut; else the line is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import zstandard

from miles.data.config import RowFormat, SourceConfig
from miles.data.files import csv_scan, json_scan
from miles.data.files.csv_rows import block_to_json
from miles.data.files.csv_scan import Header
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows, stream_rows
from miles.data.rows.normalize import normalize
from miles.data.types import OTHER_FIELDS_ROW, RowRejected
from miles.errors import SourceError
from tests.support.row_cases import refusal, take

PIECES = ["a", "é中😀", '"', '""', ",", ";", "\n", "\r\n", "", " ", "\t", "2+2?", "null"]
NAMES = ["prompt", "completion", "id"]


def manifest_of(path: Path | str) -> Manifest:
    return build_manifest([SourceConfig("s", (str(path),), RowFormat("text"))])


def all_rows(manifest: Manifest) -> list[dict[str, str]]:
    return [json.loads(row) for row in read_rows(manifest, np.arange(manifest.num_rows))]


def random_rows(draw: Random, num_rows: int) -> list[list[str]]:
    return [
        ["".join(draw.choices(PIECES, k=draw.randint(0, 5))) for _ in NAMES]
        for _ in range(num_rows)
    ]


def written(rows: list[list[str]], line_end: str, delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=line_end, delimiter=delimiter)
    writer.writerows([NAMES, *rows])
    return text.getvalue().encode()


def test_the_case_is_read() -> None:
    assert take("containers/rows.csv").turns() == [("user", "a?"), ("assistant", "A")]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.bz2", "x.tsv.zst", "semicolons.CSV"])
@pytest.mark.parametrize("buffer_bytes", [1, 7, 64, 1 << 20])
def test_rows_are_those_of_a_csv_library(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    draw: Random,
    name: str,
    buffer_bytes: int,
) -> None:
    """Also where a chunk ends within quotes, a doubled mark, a character or a line's end."""
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(json_scan, "GROUP_ROWS", 4)
    delimiter = {"x.tsv": "\t", "x.tsv.zst": "\t", "semicolons.CSV": ";"}.get(name, ",")
    rows = random_rows(draw, 23)
    content = written(rows, draw.choice(["\n", "\r\n"]), delimiter)
    if draw.random() < 0.5:
        content = b"\xef\xbb\xbf" + content.rstrip(b"\r\n")
    pack = {"bz2": bz2.compress, "zst": zstandard.compress}.get(name.rsplit(".", 1)[-1], bytes)
    (tmp_path / name).write_bytes(pack(content))

    manifest = manifest_of(tmp_path / name)
    expected = [dict(zip(NAMES, row, strict=True)) for row in rows]
    assert all_rows(manifest) == expected
    assert len(manifest.sources[0].files[0].row_groups) == 6
    wanted = np.array([22, 3, 3, 0])
    assert [json.loads(row) for row in read_rows(manifest, wanted)] == [expected[i] for i in wanted]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b'text\r\n\r\n\na\n""\n\n\r\nb')
    assert all_rows(manifest_of(tmp_path / "x.csv")) == [{"text": "a"}, {"text": ""}, {"text": "b"}]


def test_a_row_of_other_fields_is_rejected_alone() -> None:
    header = Header(("a", "b"), ",", 0)
    assert block_to_json(b'1,2\n3\n\n"4\n",5\r\n6,7,8\n9,', header) == [
        b'{"a":"1","b":"2"}',
        OTHER_FIELDS_ROW + b"1 field, and the header has 2 columns",
        b'{"a":"4\\n","b":"5"}',
        OTHER_FIELDS_ROW + b"3 fields, and the header has 2 columns",
        b'{"a":"9","b":""}',
    ]


def test_other_fields_are_named(tmp_path: Path) -> None:
    """Never as another encoding: the bytes that stand for such a row are miles' own."""
    (tmp_path / "x.csv").write_bytes(b'prompt,completion\na,b\n"x, y",b, c\n')
    rows = read_rows(manifest_of(tmp_path / "x.csv"), np.arange(2))
    with pytest.raises(
        RowRejected, match=r"^malformed_json: 3 fields, and the header has 2 columns$"
    ) as caught:
        normalize(rows[1], RowFormat("prompt_completion"))
    assert caught.value.reason == "malformed_json"

    (tmp_path / "x.csv").write_bytes(b"# an export\nprompt,completion\na,b\n")
    message = refusal(tmp_path / "x.csv")
    assert "line 2: 2 fields, and the header has 1 column. The file's first line" in message
    assert "UTF-8" not in message


def test_values_are_text_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"text,n,z\n007,NaN,null\n1e5,true,\n")
    assert all_rows(manifest_of(tmp_path / "x.csv")) == [
        {"text": "007", "n": "NaN", "z": "null"},
        {"text": "1e5", "n": "true", "z": ""},
    ]


REFUSED: dict[str, tuple[bytes, str]] = {
    "a mark within a field": (b'text,b\na,b\n"x\ny",5" disk\n', "line 4 has a quotation mark"),
    "a field that goes on": (b'text,b\n"a"b,c\n', "line 2 has a quotation mark"),
    "a mark not closed": (b'text,b\na,b\n"c,d\ne,f\n', "byte 11 is not closed when the file ends"),
    "UTF-16": ("text,b\na,b\n".encode("utf-16"), "not CSV, but UTF-16 text; .* iconv"),
    "a web page": (b"<!DOCTYPE html>\n<html>", "not CSV, but an HTML page"),
    "gzip under another name": (gzip.compress(b"text\na\n"), r"Name it x\.csv\.gz"),
    "JSON lines": (b'{"a": 1}\n', r"not CSV, as its name says, but JSON text. Name it x\.jsonl$"),
    "a JSON array": (b'[\n {"a": 1}]\n', r"JSON text. Name it x\.json$"),
    "Latin-1": ("text\nWörter\ncafé\n".encode("latin-1"), r"byte 0xf6 in line 2\). Save it as"),
    "Latin-1 in the header": ("tëxt\na\n".encode("latin-1"), "byte 0xeb in line 1"),
    "a carriage return alone": (b"text,b\ra,b\r", "lines end with a carriage return alone"),
    "two columns of one name": (b"text,text\na,b\n", "no header: two columns are called 'text'"),
    "an empty header": (b",\na,b\n", "no header: it is empty"),
    "no header but a row": (b"x" * 300 + b",b\n", "no header: a field has more than 200"),
    "no row": (b"text,b\n", "has no row"),
    "an empty file": (b"\n", "has no row"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_wrong_is_named(tmp_path: Path, kind: str) -> None:
    content, message = REFUSED[kind]
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        manifest_of(tmp_path / "x.csv")
    assert "x.csv" in str(caught.value)


def test_a_header_that_is_a_row_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"What is 2+2?,4\nWhat is 3+3?,6\n")
    message = refusal(tmp_path / "x.csv")
    assert "rows have What is 2+2?, 4" in message
    assert "The first line of a CSV file names its columns" in message


def test_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_scan, "MAX_ROW_BYTES", 1_000)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 100)
    (tmp_path / "x.csv").write_bytes(b'text\n"' + b"a\n" * 1_000 + b'"\n')
    with pytest.raises(SourceError, match="begins at byte 5 does not end in 1,000 bytes"):
        manifest_of(tmp_path / "x.csv")


def test_rows_stream_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_scan, "GROUP_BYTES", 100)
    (tmp_path / "x.csv").write_bytes(written([["a" * 40, "b", "c"]] * 30, "\n"))
    manifest = manifest_of(tmp_path / "x.csv")
    sizes = [len(rows) for rows in stream_rows(manifest, np.arange(30))]
    assert max(sizes) <= 3
    assert sum(sizes) == 30
