"""Rows of Parquet that are null, empty, or hold what JSON has no type for."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.bad_rows import SECRET, Outcome, chat, config_of, run


def run_table(table: pa.Table, folder: Path, tokenizer: Path) -> Outcome:
    file = folder / "rows.parquet"
    pq.write_table(table, file, row_group_size=2)
    return run(config_of([file], tokenizer), folder)


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def test_parquet_rows_that_are_null_or_empty(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    good = chat("4")["messages"]
    user = [{"role": "user", "content": SECRET}]
    rows = [
        good,
        None,
        [],
        [None],
        good,
        [*user, {"role": "assistant", "content": None}],
        [*user, {"role": None}],
        user,
    ]

    got = run_table(
        pa.table({"messages": pa.array(rows, MESSAGES)}), tmp_path, chatml_tokenizer_folder
    )
    assert got.dropped == [
        (1, "no_messages"),
        (2, "no_messages"),
        (3, "bad_message"),
        (5, "bad_message"),
        (6, "unknown_role"),
        (7, "nothing_to_train"),
    ]
    assert got.trained == [0, 4]


def test_a_parquet_string_that_is_no_text(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    answers = pa.array([b"good", SECRET.encode() + b"\xff\xfe", b"good", b"good"]).view(pa.string())
    questions = pa.array(["2+2?"] * 4)
    turns = [
        pa.StructArray.from_arrays([pa.array([role] * 4), texts], ["role", "content"])
        for role, texts in (("user", questions), ("assistant", answers))
    ]
    flat = pa.concat_arrays(turns).take(pa.array([0, 4, 1, 5, 2, 6, 3, 7]))
    messages = pa.ListArray.from_arrays(pa.array([0, 2, 4, 6, 8], pa.int32()), flat)
    got = run_table(pa.table({"messages": messages}), tmp_path, chatml_tokenizer_folder)
    assert got.dropped == [(1, "malformed_json")]
    assert got.trained == [0, 2, 3]


def test_other_columns_of_any_type(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    deep: Any = "x"
    kind = pa.string()
    for _ in range(30):
        deep = [deep]
        kind = pa.list_(kind)

    table = pa.table(
        {
            "messages": pa.array([chat(answer)["messages"] for answer in "abcd"], MESSAGES),
            "score": pa.array([float("nan"), float("inf"), None, 0.5]),
            "day": pa.array(
                [datetime.date(2024, 1, 2), None, datetime.date.max, datetime.date.min]
            ),
            "money": pa.array(
                [decimal.Decimal("1.50"), None, decimal.Decimal("-0.01"), decimal.Decimal(0)]
            ),
            "deep": pa.array([deep, None, [], deep], kind),
            "word": pa.array(["a", "b", "a", None]).dictionary_encode(),
        }
    )
    got = run_table(table, tmp_path, chatml_tokenizer_folder)
    assert got.text == ""
    assert got.trained == [0, 1, 2, 3]


def test_a_date_beyond_python_costs_one_row(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    table = pa.table(
        {
            "messages": pa.array([chat(answer)["messages"] for answer in "abc"], MESSAGES),
            "day": pa.array([0, 10**7, 1], pa.date32()),
        }
    )
    got = run_table(table, tmp_path, chatml_tokenizer_folder)
    assert got.dropped == [(1, "malformed_json")]
