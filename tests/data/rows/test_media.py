"""Rows with an image, sound or film: dropped where the text stands around it."""

from __future__ import annotations

from typing import Any

import pytest

from miles.data.rows.media import MEDIA
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
