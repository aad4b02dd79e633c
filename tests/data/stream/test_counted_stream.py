"""A stream that is counted: the engine that suits the number of its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
    StreamConfig,
)
from miles.data.encoding import kept_encoders
from miles.data.stream.counted_stream import CountedStream

ROW = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


@pytest.fixture
def config(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DataConfig:
    """Ten rows, and an empty cache."""
    monkeypatch.setenv("MILES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_encoders, "_kept", {})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n" * 10)
    return DataConfig(
        (SourceConfig("rows", (str(path),), RowFormat("messages")),),
        OrderConfig(batch_size=10),
        EncodeConfig(str(chatml_tokenizer_folder)),
        PackConfig(1, 8192),
        StreamConfig(loader_cpus=2),
    )


def epochs(config: DataConfig, num_epoch: int) -> DataConfig:
    return replace(config, order=replace(config.order, num_epoch=num_epoch))


def test_few_rows_repay_no_second_engine(config: DataConfig) -> None:
    stream = CountedStream.count(epochs(config, 9_999))
    assert stream.encode == replace(config.encode, tokenizer_engine="tiktoken")
    assert not stream.has_many_rows


def test_many_rows_take_the_fastest_engine_at_once(config: DataConfig) -> None:
    stream = CountedStream.count(epochs(config, 10_000))
    assert stream.encode == config.encode
    assert stream.has_many_rows


def test_the_engine_changes_no_fingerprint(config: DataConfig) -> None:
    few = CountedStream.count(config)
    by_name = replace(config, encode=replace(config.encode, tokenizer_engine="tokenizers"))
    assert few.info == CountedStream.count(by_name).info
