"""What broken JSON looks like is told in plain words, and never quotes it."""

from __future__ import annotations

import json

import pytest

from miles.common.json_faults import likely_encoding, likely_fault


@pytest.mark.parametrize(
    ("text", "likely"),
    [
        ("{'a': 1}", "single quotes"),
        ("{\"a\": 'x'}", "single quotes"),
        ('{"a": 1},', "a comma behind the object"),
        ('{"a": 1}{"a": 2}', "another object on the same line"),
        ('{"a": 1,}', "a comma behind the last entry"),
        ('{"a": [1, ]}', "a comma behind the last entry"),
        ('{"a": None}', "None, True or False"),
        ('{"a": 1, // why\n"b": 2}', "a comment"),
        ('{"a": \u201cx\u201d}', "typographic quotes"),
        ("{a: 1}", "a name without quotes"),
        ('{"a": "x\ny"}', "a line break or control character"),
        ('{"a": "x', "cut off"),
        ('{"a": ', "cut off"),
        ('{"a": [1, 2', "cut off"),
        ('{"a" 1}', ""),
        ("nonsense", ""),
        ("", ""),
    ],
)
def test_what_is_wrong_with_a_text(text: str, likely: str) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    found = likely_fault(caught.value, text)
    assert found.startswith(likely)
    assert bool(found) == bool(likely)


@pytest.mark.parametrize(
    ("text", "encoding", "likely"),
    [
        ("Größe: fünf", "latin-1", "Latin-1 or Windows-1252"),
        ("Größe: fünf", "utf-16-le", "UTF-16"),
        ("这是一个问题", "gbk", "another encoding, such as GBK"),
        ("これは質問です", "shift-jis", "another encoding, such as GBK"),
    ],
)
def test_what_an_encoding_looks_like(text: str, encoding: str, likely: str) -> None:
    assert likely_encoding(json.dumps({"a": text}, ensure_ascii=False).encode(encoding)).startswith(
        likely
    )


def test_damage_is_not_taken_for_an_encoding() -> None:
    assert likely_encoding("Größe ".encode() + b"\xff") == "damaged UTF-8, or several encodings"
