"""Files of JSON lines, on a disk and on an object store: read, appended to, cut back to a step."""

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
    assert json_lines.repair(url) == []
    assert json_lines.keep_before(url, 3) == []
    assert not storage.exists(url)


def test_appended_lines_follow_the_earlier_ones(url: str) -> None:
    json_lines.append(url, [line(0)], earlier=[])
    json_lines.append(url, [line(1), line(2)], earlier=[line(0)])
    assert storage.read_text(url) == f"{line(0)}\n{line(1)}\n{line(2)}\n"
    assert json_lines.read(url) == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_half_a_line_is_cut_off(url: str) -> None:
    storage.write_text(url, f'{line(0)}\n{{"st')
    assert json_lines.read(url) == [{"step": 0}]
    assert json_lines.repair(url) == [line(0)]
    assert storage.read_text(url) == f"{line(0)}\n"


def test_lines_from_a_step_on_are_dropped(url: str) -> None:
    json_lines.write(url, map(line, [0, 2, 2, 4]))
    assert json_lines.keep_before(url, 3) == [line(0), line(2), line(2)]
    assert json_lines.read(url) == [{"step": 0}, {"step": 2}, {"step": 2}]


def test_a_line_separator_inside_a_text(url: str) -> None:
    entry = {"answer": "one\u2028two"}
    json_lines.write(url, [json.dumps(entry, ensure_ascii=False)])
    assert json_lines.read(url) == [entry]
