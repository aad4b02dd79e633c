"""Rows with an image, sound or film: dropped where the text stands around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data.files.media_columns import MEDIA
from tests.support.raw_rows import ANSWER, ASK, normalized, rejected
from tests.support.row_cases import take


@pytest.mark.parametrize(("key", "mark"), MEDIA.items())
def test_a_row_with_an_image_that_its_text_speaks_of(key: str, mark: str) -> None:
    shown = {"from": "human", "value": f"{mark}\nWhat is this?"}
    for value in ("x/1.jpg", ["x/1.jpg"], {"path": "x/1.jpg"}):
        reason, detail = rejected({"conversations": [shown, ANSWER], key: value})
        assert (reason, detail) == ("has_image", f"message 0 says {mark}, and the row has {key}")
        assert len(normalized({"conversations": [ASK, ANSWER], key: value}).messages) == 2
    for nothing in (None, "", [], {}):
        assert len(normalized({"conversations": [shown, ANSWER], key: nothing}).messages) == 2
    assert len(normalized({"conversations": [shown, ANSWER]}).messages) == 2
    pair = {"prompt": mark, "completion": "4", key: "x"}
    assert rejected(pair, "prompt_completion")[0] == "has_image"


@pytest.mark.parametrize("key", MEDIA)
def test_a_turn_with_an_image(key: str) -> None:
    def row(value: Any) -> dict[str, Any]:
        return {"conversations": [{**ASK, key: value}, ANSWER]}

    assert rejected(row("x")) == ("has_image", f"turn 0 has {key}")
    for nothing in (None, "", []):
        assert normalized(row(nothing)).messages[0] == {"role": "user", "content": "2+2?"}


def test_cases_with_images() -> None:
    assert take("shapes/llava.jsonl").reasons == ["has_image"] * 3


def test_images_that_are_bytes_are_not_read_and_not_forgotten(tmp_path: Path) -> None:
    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": "4"}]

    messages = [turns("<image>\nWhat is this?"), turns("2+2?")]
    table = pa.table({"messages": messages, "images": [[{"bytes": b"\xff"}], None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    taken = take(tmp_path / "rows.parquet")
    assert taken.reasons == ["has_image", None]
    assert taken.turns(1) == [("user", "2+2?"), ("assistant", "4")]
    assert take("arrow-types/image.parquet").turns()[0] == ("user", "Name a tree, number 0.")
