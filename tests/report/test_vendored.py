"""The library in the page is the one that was looked at: miles/report/page/README.md says which."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from miles.report.parts import PAGE_FOLDER

FILES = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""Of uPlot 1.6.32, as npm has it."""


@pytest.mark.parametrize("name", FILES)
def test_a_vendored_file_is_unchanged(name: str) -> None:
    content = (PAGE_FOLDER / "vendor" / "uplot" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == FILES[name]


def test_nothing_else_is_vendored() -> None:
    there = {path.name for path in Path(PAGE_FOLDER / "vendor").rglob("*") if path.is_file()}
    assert there == set(FILES)
    assert "(v1.6.32)" in (PAGE_FOLDER / "vendor/uplot/uPlot.iife.min.js").read_text()[:100]


def test_no_script_can_end_its_element() -> None:
    for path in PAGE_FOLDER.rglob("*.js"):
        text = path.read_text()
        assert "</script" not in text, path
        assert "<!--" not in text, path
