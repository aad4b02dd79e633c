"""The shape of a source's rows: the first file has it, and the others must not have another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.data.config import RowFormat, SourceConfig
from miles.data.files import other_files
from miles.data.files.manifest import build_manifest
from miles.errors import SourceError

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a", "completion": "b"}


def write(folder: Path, **files: object) -> Path:
    """Write JSON lines of one row, or the text that is given."""
    for name, row in files.items():
        text = row if isinstance(row, str) else json.dumps(row)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def error_of(folder: Path, format: RowFormat | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        build_manifest([SourceConfig("s", (str(folder),), format or RowFormat())])
    return str(caught.value)


def test_a_later_file_of_another_shape_is_named(tmp_path: Path) -> None:
    write(tmp_path, a=CHAT, b=CHAT, c=PAIR)
    message = error_of(tmp_path)
    assert f"those of {tmp_path}/a.jsonl are messages" in message
    assert f"those of {tmp_path}/c.jsonl are prompt_completion (prompt, completion)" in message
    assert "--row-shape messages" in message


def test_a_named_shape_is_not_doubted(tmp_path: Path) -> None:
    write(tmp_path, a=CHAT, b=PAIR)
    manifest = build_manifest([SourceConfig("s", (str(tmp_path),), RowFormat("messages"))])
    assert manifest.num_rows == 2


def test_columns_without_values_are_of_the_shape(tmp_path: Path) -> None:
    write(tmp_path, a=CHAT, b={"messages": None, "note": "x"}, c="\n \n")
    manifest = build_manifest([SourceConfig("s", (str(tmp_path),))])
    assert manifest.sources[0].format.shape == "messages"


def test_a_first_file_without_a_shape_is_told_from_the_others(tmp_path: Path) -> None:
    write(tmp_path, a={"splits": "train"}, b=CHAT)
    message = error_of(tmp_path)
    assert f"{tmp_path}/a.jsonl" in message
    assert f"{tmp_path}/b.jsonl, has rows of the shape messages: if {tmp_path}/a.jsonl" in message


def test_a_later_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, a=CHAT, b="{'messages': []}\n{'messages': []}")
    message = error_of(tmp_path)
    assert f"{tmp_path}/b.jsonl: none of the first 2 rows can be read" in message


def test_few_of_many_files_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, **{f"{number:03}": CHAT for number in range(101)})
    looked_at = []
    first_rows = other_files.first_rows

    def noted(file, *args, **kwargs):  # type: ignore[no-untyped-def]
        looked_at.append(Path(file.path).name)
        return first_rows(file, *args, **kwargs)

    monkeypatch.setattr(other_files, "first_rows", noted)
    build_manifest([SourceConfig("s", (str(tmp_path),))])
    assert looked_at == ["033.jsonl", "066.jsonl", "100.jsonl"]


def test_a_source_without_a_row_says_what_its_files_hold(tmp_path: Path) -> None:
    write(tmp_path, a="", b=" \n\r\n")
    message = error_of(tmp_path)
    assert f"has no row: {tmp_path}/a.jsonl (an empty file), " in message
    assert f"{tmp_path}/b.jsonl (only blanks)" in message
