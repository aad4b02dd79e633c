"""Our own files, broken in each way that a disk, a copy or another version breaks them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from miles.common import run_folder
from miles.common.own_files import mend, mend_text, read_object, read_records, write_if_new
from miles.errors import BrokenFileError, MissingFileError, WriteError
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, observed

WHOLE = json.dumps({"cursor": {"consumed_rows": 7}, "text": "é\u2028"}, indent=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (bytes(100), "full of zero bytes"),
        (WHOLE.encode()[:-2], "cut off behind line"),
        (WHOLE.encode()[:20], "cut off behind line 3"),
        (b'{"cursor": "abc', "cut off behind line 1"),
        (b"\x89PNG", "not UTF-8 text (byte 0x89 at 0)"),
        (b"<html>", "not JSON (Expecting value in line 1, column 1)"),
        (b"[" * 100_000 + b"]" * 100_000, "not JSON (maximum recursion"),
        (b"1" * 10_000, "not JSON (Exceeds the limit"),
        (b"[1]", "a JSON object was expected; found a list"),
        (b"null", "a JSON object was expected; found null"),
        (b"7", "a JSON object was expected; found a number"),
        (b'{"version": 9}', "'cursor' is missing; found 'version'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "miles.json"
    path.write_bytes(content)
    with pytest.raises(BrokenFileError) as refused:
        read_object(str(path), "cursor")
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


def test_a_whole_file_and_none(tmp_path: Path) -> None:
    path = tmp_path / "miles.json"
    with pytest.raises(MissingFileError):
        read_object(str(path))
    path.write_text(WHOLE)
    assert read_object(str(path), "cursor") == json.loads(WHOLE)


def test_a_broken_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "starts.jsonl"
    good = ['{"step": 0, "text": "\u2028"}', '{"step": 1}', '{"step": 2}']
    content = [good[0].encode(), b'{"st', b"\xff\xfe", good[1].encode(), b'["step"]', b'{"x": 1}']
    path.write_bytes(b"\n".join([*content, good[2].encode(), b'{"step": 3']))

    records = read_records(str(path), (("step",), ("other",)))
    assert list(records.lines) == good
    assert [entry["step"] for entry in records.objects] == [0, 1, 2]
    assert records.broken_text == "lines 2, 3, 5, 6"
    assert read_records(str(tmp_path / "none")).lines == ()

    broken = path.read_bytes()
    sentence = mend(str(path), (("step",),))
    assert "lines 2, 3, 5, 6 cannot be read; the other 3 are kept" in sentence
    assert path.read_text() == "".join(line + "\n" for line in good)
    assert (tmp_path / "starts.jsonl.broken").read_bytes() == broken
    assert mend(str(path), (("step",),)) == ""

    path.write_text("{\n")
    assert f"The whole file is in {path}.broken-2" in mend(str(path))
    assert path.read_text() == ""


def test_half_a_line_at_the_end_is_left_to_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st')
    assert mend(str(path), (("step",),)) == ""
    assert path.read_text() == '{"step": 0}\n{"st'


def test_a_log_that_is_no_text_is_kept_as_text(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    assert mend_text(str(path)) == ""
    path.write_bytes(b"a\n\xff\x00b\n")
    assert "not UTF-8 text; the rest is kept" in mend_text(str(path))
    assert path.read_text() == "a\n\ufffd\x00b\n"
    assert mend_text(str(path)) == ""


def test_a_record_that_is_there_needs_no_room(tmp_path: Path) -> None:
    """A restart finds its config.json and certificate.json; a new start on a full disk is refused."""
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        config = disk / run_folder.CONFIG
        write_if_new(str(config), "{}")
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free))
        written = config.stat().st_mtime_ns
        write_if_new(str(config), "{}")
        assert config.stat().st_mtime_ns == written
        with pytest.raises(WriteError) as refused:
            write_if_new(str(config), "{1}")
        assert config.read_text() == "{}"
        text = str(refused.value)
        observed("config.json on a full disk", text, run_folder.CONFIG, NOTHING)

        (disk / "ballast").unlink()
        config.write_bytes(b"\xff")
        write_if_new(str(config), "{1}")
        assert config.read_text() == "{1}"
