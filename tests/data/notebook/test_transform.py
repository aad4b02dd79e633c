"""prepare() with a function that makes the rows: what is seen behind it, counted, and refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import miles.data
from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
)
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.notebook.prepare import Prepared
from miles.data.stream import survey
from miles.data.stream.counted_stream import CountedStream
from miles.data.transforms import Function, Transform
from miles.errors import CheckpointError, DataError, SourceError

RAW = [
    {"n": number, "q": {"text": f"{number}+2?"}, "a": [str(number + 2)], "source": "x"}
    for number in range(200)
]


def to_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return the turns of a row of `RAW`."""
    return [
        {"role": "user", "content": row["q"]["text"]},
        {"role": "assistant", "content": row["a"][0]},
    ]


def every_third(row: dict[str, Any]) -> Any:
    return None if row["n"] % 3 else to_messages(row)


def with_faults(row: dict[str, Any]) -> Any:
    if row["n"] % 50 == 49:
        raise LookupError(row["q"]["text"])
    return {"conversation": to_messages(row), "score": row["n"]}


def prepared(tokenizer: Path, source: Any = RAW, **settings: Any) -> Prepared:
    return miles.data.prepare("rows", source=source, tokenizer=str(tokenizer), **settings)


def samples(data: Prepared) -> list[tuple[list[int], list[int]]]:
    outcomes = data._outcomes(np.arange(data.num_rows))
    results = [outcome.result for *_, outcome in outcomes]
    return [(one.input_ids.tolist(), one.loss_mask.tolist()) for one in results]  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [list, pd.DataFrame])
def test_rows_are_those_of_a_file_with_what_it_makes(
    chatml_tokenizer_folder: Path, make: Any
) -> None:
    rows = [{"messages": to_messages(row)} for row in RAW]
    expected = samples(prepared(chatml_tokenizer_folder, rows))
    data = prepared(chatml_tokenizer_folder, make(RAW), transform=to_messages)
    assert samples(data) == expected
    assert len(expected) == len(RAW)


def test_shape_and_columns_are_those_behind_it(chatml_tokenizer_folder: Path) -> None:
    data = prepared(chatml_tokenizer_folder, transform=with_faults, max_bad_fraction=0.1)
    (source,) = data.manifest.sources
    assert source.format.shape == "messages"
    assert source.columns["messages"] == "conversation"
    assert source.unused_columns == ("score",)
    assert "messages in conversation" in data.to_text()

    without = prepared(chatml_tokenizer_folder, transform=lambda row: {"text": row["q"]["text"]})
    assert without.manifest.sources[0].format.shape == "text"


def test_an_exception_drops_its_row(chatml_tokenizer_folder: Path, tmp_path: Path) -> None:
    data = prepared(chatml_tokenizer_folder, transform=with_faults, max_bad_fraction=0.1)
    line = with_faults.__code__.co_firstlineno + 2
    rejects = [(entry["row"], entry["reason"], entry["detail"]) for entry in data.ledger()]
    assert rejects == [
        (row, "transform_error", f"LookupError (line {line} of test_transform.py)")
        for row in (49, 99, 149, 199)
    ]
    assert "4 transform_error" in data.to_text()
    with pytest.raises(DataError, match=r"4 of the 200 rows read were dropped"):
        prepared(chatml_tokenizer_folder, transform=with_faults).write(str(tmp_path / "out"))


def test_rows_left_out_are_counted_and_are_not_bad(
    chatml_tokenizer_folder: Path, tmp_path: Path
) -> None:
    data = prepared(chatml_tokenizer_folder, transform=every_third, max_bad_fraction=0.0)
    assert "133 left_out_by_transform of 200 rows" in data.to_text()
    data.write(str(tmp_path / "out"))
    assert data.ledger() == []
    counts = json.loads((tmp_path / "out/summary.json").read_text())["ledger"]["rows"]["counts"]
    assert counts == {"read": 200, "trained": 67, "left_out_by_transform": 133}


def test_the_dry_run_sees_what_a_run_sees(chatml_tokenizer_folder: Path) -> None:
    config = config_of(chatml_tokenizer_folder, every_third)
    config = replace(config, max_bad_fraction=0.0)
    sample = survey.survey(config, CountedStream.count(config), num_steps=10).sample
    assert (sample.num_rows, len(sample.lengths)) == (200, 67)


def test_many_in_a_row_may_be_left_out(chatml_tokenizer_folder: Path) -> None:
    first = 150
    data = prepared(
        chatml_tokenizer_folder,
        transform=lambda row: to_messages(row) if row["n"] > first else None,
        row_shape="messages",
    )
    assert data.ledger() == []
    assert data.summary().reasons == {"left_out_by_transform": 151}


def test_a_function_that_makes_no_row_says_what_it_does(chatml_tokenizer_folder: Path) -> None:
    with pytest.raises(
        SourceError, match=r"makes no row of the first 100; of the first one: left_"
    ):
        prepared(chatml_tokenizer_folder, transform=lambda row: None)
    with pytest.raises(SourceError, match=r"have foo.*These are the rows that .*<lambda> makes"):
        prepared(chatml_tokenizer_folder, transform=lambda row: {"foo": 1})


def _fingerprint(file: Path, transform: Function | None) -> str:
    rows = RowFormat("messages", transform=transform and Transform.of(transform))
    return build_manifest([SourceConfig("rows", (str(file),), rows)]).fingerprint


def test_the_fingerprint_follows_the_code(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in RAW))

    def same(row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the turns of a row of `RAW`."""
        return [
            # Another comment.
            {"role": "user", "content": row["q"]["text"]},
            {"role": "assistant", "content": row["a"][0]},
        ]

    prints = [_fingerprint(file, function) for function in (None, to_messages, same, every_third)]
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3


def test_a_manifest_keeps_name_and_hash(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in RAW))
    rows = RowFormat(transform=Transform.of(to_messages))
    manifest = build_manifest([SourceConfig("rows", (str(file),), rows)])
    text = manifest.to_json()
    code = Transform.of(to_messages).code
    assert json.loads(text)["sources"][0]["format"]["transform"] == {
        "name": f"{__name__}:to_messages",
        "code": code,
    }
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).fingerprint == manifest.fingerprint


def config_of(tokenizer: Path, transform: Function) -> DataConfig:
    """Return the settings of a run over `RAW`."""
    file = tokenizer / "raw_rows.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in RAW))
    rows = RowFormat(transform=Transform.of(transform))
    return DataConfig(
        (SourceConfig("rows", (str(file),), rows),),
        OrderConfig(batch_size=20),
        EncodeConfig(str(tokenizer), max_sample_tokens=512),
        PackConfig(max_tokens_per_gpu=512),
    )


def test_a_run_does_not_resume_with_other_code(chatml_tokenizer_folder: Path) -> None:
    before = CountedStream.count(config_of(chatml_tokenizer_folder, to_messages))
    after = CountedStream.count(config_of(chatml_tokenizer_folder, every_third))
    cursor = replace(before.beginning, consumed_rows=40)
    assert before.cursor_from(cursor, "there") == cursor
    with pytest.raises(CheckpointError, match=re.escape("--transform or the code of its function")):
        after.cursor_from(cursor, "there")
