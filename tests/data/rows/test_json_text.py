"""The fast decoder of rows takes less than Python's, which is the definition, and reads it alike."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miles.data.rows.json_text import strict_object
from miles.data.rows.number_texts import FINITE_DECODER, text_of_row

NUMBERS = st.from_regex(
    r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True
)
TEXTS = st.text(st.characters() | st.sampled_from('\x00\x1f\x7f"\\/\ud83d\udc4d'), max_size=6)
VALUES = st.recursive(
    NUMBERS | TEXTS.map(json.dumps) | st.sampled_from(["true", "null", "NaN", "-Infinity"]),
    lambda values: (
        st.lists(values, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(TEXTS.map(json.dumps), values), max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key}:{value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    value=VALUES,
    at=st.integers(0, 80),
    cut=st.integers(0, 2),
    put=st.sampled_from(
        [b""] * 9 + [b"\x00", b"\n", b"\xff", b"\xed\xa0\x80", b"\\u00", b",", b"0"]
    ),
)
@example("1" * 5_000, 0, 0, b"")
@example("[" * 2_000 + "]" * 2_000, 0, 0, b"")
@example('1, "a": 2', 0, 0, b"")
@example("1", 0, 0, b"\xef\xbb\xbf")
@example('"\\ud83d\\udc4d"', 0, 0, b"")
@example("123456789012345678901234567890", 0, 0, b"")
def test_a_row_is_read_alike(value: str, at: int, cut: int, put: bytes) -> None:
    row = b'{"a": %b}' % value.encode("utf-8", "surrogatepass")
    row = row[:at] + put + row[at + cut :]
    strict = strict_object(row)
    if strict is not None:
        # As texts, so that the types, the signs of zero and the order of keys are the same.
        assert repr(strict) == repr(FINITE_DECODER.decode(text_of_row(row)))
        json.dumps(strict, ensure_ascii=False).encode()  # fails for half of a surrogate pair


@pytest.mark.parametrize(
    "row", [b'{"a": [1, -0.0, 1e5, "\\u00e9\\/"]}', '{"a": {"é": null}}'.encode(), b' {"a": 10}\n']
)
def test_usual_rows_take_it(row: bytes) -> None:
    assert strict_object(row) == json.loads(row)
