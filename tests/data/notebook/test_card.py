"""The card of a data set: its lines, scaled up from a sample or exact, and its HTML."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from miles.data.config import SourceConfig
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.notebook.card import Card, Summary
from miles.data.reasons import REASONS


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "rows.jsonl").write_text(4_000 * (json.dumps(row) + "\n"))
    return build_manifest((SourceConfig("a <b>", (str(tmp_path / "rows.jsonl"),)),))


def summary(num_rows: int, lengths: list[int], **reasons: int) -> Summary:
    return Summary(num_rows, np.array(lengths, np.int64), sum(lengths) // 4, reasons)


def test_the_lines_of_all_rows(manifest: Manifest) -> None:
    card = Card(manifest, summary(4_000, [10, 20, 30], too_long=3, no_messages=1), False)
    assert card.lines() == [
        ("rows", "4,000 in 1 file"),
        ("sources", "a <b> (messages in messages)"),
        ("tokens", "60 (20 a row)"),
        ("trained", "25.0% of the tokens"),
        ("row length", "median 20, 90th percentile 28, 99th 29 tokens"),
        ("dropped", "3 too_long, 1 no_messages of 4,000 rows"),
        ("", f"too_long: {REASONS['too_long'].remedy}"),
        ("", f"no_messages: {REASONS['no_messages'].remedy}"),
        ("numbers", "every row read"),
    ]


def test_a_sample_is_scaled_up(manifest: Manifest) -> None:
    lines = dict(Card(manifest, summary(40, [100, 110]), True).lines())
    assert lines["tokens"] == "about 21,000 (105 a row)"
    assert lines["dropped"] == "none of 40 rows"
    assert lines["numbers"] == "from a sample of 40 rows"


def test_the_html_holds_the_lines_and_two_charts(manifest: Manifest) -> None:
    card = Card(manifest, summary(4_000, [10, 20, 30]), False)
    fragment = card.to_html()
    for label, value in card.lines():
        assert label == "numbers" or label in fragment
        assert value.replace("<b>", "&lt;b&gt;") in fragment
    assert "width:25.0%" in fragment
    assert len(re.findall(r"height:[1-9]\d*px\"></span>", fragment)) == 3
    assert not re.search(r"https?:|<script|<link|<style|<b>", fragment)


def test_what_is_not_used_is_named_in_short(tmp_path: Path) -> None:
    row = {"text": "a", **{f"column {number}": 1 for number in range(30)}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    manifest = build_manifest((SourceConfig("wide", (str(tmp_path / "rows.jsonl"),)),))
    numbers = Summary(1, np.array([3]), 3, {}, {"wide": {"<mood>": 1, "thought": 1_200}})
    card = Card(manifest, numbers, False)
    lines = dict(card.lines())
    assert lines["keys not used"] == "thought (1,200 rows), <mood> (1 row)"
    columns = ", ".join(f"column {number}" for number in range(6))
    assert lines["columns not used"] == f"{columns} and 24 more"
    assert "&lt;mood&gt;" in card.to_html()
    assert "column 5 and 24 more" in card.to_html()
    assert max(map(len, card.to_text(80).splitlines())) <= 80


def test_nothing_is_said_where_all_is_used(manifest: Manifest) -> None:
    card = Card(manifest, summary(4_000, [10, 20, 30]), False)
    assert "not used" not in card.to_text() + card.to_html()


def test_no_usable_row_is_no_error(manifest: Manifest) -> None:
    card = Card(manifest, summary(4_000, [], nothing_to_train=4_000), False)
    assert "4,000 nothing_to_train of 4,000 rows" in card.to_text()
    assert "rows by length" not in card.to_html()
