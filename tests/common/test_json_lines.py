"""Files of JSON lines, on a disk and on an object store: read and written."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from miles.common import json_lines, storage


@pytest.fixture(params=["disk", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a file that is not there yet."""
    if request.param == "disk":
        return str(tmp_path / "folder/steps.jsonl")
    return f"memory://{uuid.uuid4().hex}/steps.jsonl"


def line(step: int) -> str:
    return json.dumps({"step": step})


def test_a_missing_file_has_no_lines(url: str) -> None:
    assert json_lines.read(url) == []
    assert not storage.exists(url)


def test_half_a_line_is_passed_over(url: str) -> None:
    storage.write_text(url, f'{line(0)}\n{{"st')
    assert json_lines.read(url) == [{"step": 0}]
    assert json_lines.split(url) == ([line(0)], '{"st')


def test_a_line_separator_inside_a_text(url: str) -> None:
    entry = {"answer": "one\u2028two"}
    json_lines.write(url, [json.dumps(entry, ensure_ascii=False)])
    assert json_lines.read(url) == [entry]
