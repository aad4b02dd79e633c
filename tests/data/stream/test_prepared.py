"""The files that `prepare` makes of windows: each holds rows of one window, and none is lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
)
from miles.data.files.manifest import build_manifest
from miles.data.rows.message_parts import PartLimits
from miles.data.step_schemas import PARTS_STEP
from miles.data.stream import prepared


def test_files_end_where_windows_do(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 8 rows, steps of 2, files of 3 or more, and every seventh row dropped."""
    lines = [json.dumps({"text": f"row {row}"} if row % 7 else {"text": [1]}) for row in range(21)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        (SourceConfig("rows", (str(tmp_path / "rows.jsonl"),), RowFormat("text")),),
        OrderConfig(batch_size=2, window_rows=8),
        EncodeConfig(str(chatml_tokenizer_folder)),
        PackConfig(1, 8192),
    )
    monkeypatch.setattr(prepared.stages, "TABLE_ROWS", 1)  # a table for each step

    rows_of_parts: list[list[int]] = []
    steps: list[dict[str, Any]] = []
    for table in prepared.local_parts(
        build_manifest(config.sources), config, PartLimits(part_rows=3)
    ):
        assert table.schema == PARTS_STEP
        steps += table.to_pylist()
    for step in steps:
        if step["part"] is not None:
            rows = pq.read_table(io.BytesIO(step["part"]))
            assert rows["text"].to_pylist() == [f"row {row}" for row in rows["row_id"].to_pylist()]
            rows_of_parts.append(rows["row_id"].to_pylist())

    #                           window 0                         window 1, which begins at row 8
    assert rows_of_parts == [
        [1, 2, 3],
        [4, 5, 6],
        [8, 9, 10, 11],
        [12, 13, 15],
        [16, 17, 18, 19],
        [20],
    ]
    assert [step["step"] for step in steps] == list(range(11))
    assert [reject["row_id"] for step in steps for reject in step["rejects"]] == [0, 7, 14]
