"""Rows of any shape become prompts: without their last answer, which is the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.chat.prompt_rows import Prompt, PromptRows
from miles.data.config import RowFormat
from miles.data.types import RowRejected
from miles.errors import SourceError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def prompts(tmp_path: Path, rows: list[Any]) -> list[Any]:
    """Return the prompts of rows in a JSON file."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = PromptRows.open(str(file), RowFormat())
    return list(opened.read(0, opened.num_rows))


def parts(prompt: Prompt | RowRejected) -> tuple[list[Any], str | None]:
    assert isinstance(prompt, Prompt), prompt
    return [dict(message) for message in prompt.messages], prompt.reference


SHAPES = {
    "messages": ({"messages": [user("2+2?"), assistant("4")]}, "4"),
    "messages, nothing to train": ({"messages": [user("2+2?")]}, None),
    "messages as JSON text": ({"messages": json.dumps([user("2+2?")])}, None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        "4",
    ),
    "ShareGPT without an answer": ({"conversations": [{"from": "human", "value": "2+2?"}]}, None),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, "4"),
    "a prompt": ({"prompt": "2+2?", "id": 7}, None),
    "a prompt of messages": ({"prompt": [user("2+2?")]}, None),
    "a question": ({"question": "2+2?"}, None),
    "Alpaca": ({"instruction": "2+2?", "input": "", "output": "4"}, "4"),
    "an instruction": ({"instruction": "2+2?"}, None),
}


@pytest.mark.parametrize(("row", "reference"), SHAPES.values(), ids=SHAPES)
def test_a_row_of_each_shape(row: Any, reference: str | None, tmp_path: Path) -> None:
    for prompt in prompts(tmp_path, [row, row]):
        assert parts(prompt) == ([user("2+2?")], reference)


def test_only_the_last_answer_is_dropped(tmp_path: Path) -> None:
    turns = [user("2+2?"), assistant("4"), user("3+3?")]
    with_answer, without = prompts(
        tmp_path, [{"messages": [*turns, assistant("6")]}, {"messages": turns}]
    )
    assert parts(with_answer) == (turns, "6")
    assert parts(without) == (turns, None)


def test_system_and_tools_stay(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    (prompt,) = prompts(
        tmp_path, [{"system": "Be brief.", "messages": [user("2+2?")], "tools": tools}]
    )
    assert parts(prompt)[0] == [{"role": "system", "content": "Be brief."}, user("2+2?")]
    assert [dict(tool) for tool in prompt.tools] == tools


def test_questions_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "n": [1, 2]}), tmp_path / "rows.parquet")
    rows = PromptRows.open(str(tmp_path / "rows.parquet"), RowFormat())
    found = [parts(prompt)[0] for prompt in rows.read(0, 2)]
    assert found == [[user("a")], [user("b")]]


def test_a_row_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    good = {"messages": [user("2+2?")]}
    alone = {"messages": [assistant("I begin.")]}
    bare = {"messages": [{"role": "system", "content": "Be brief."}]}
    empty: dict[str, Any] = {"messages": []}
    found = prompts(tmp_path, [good, alone, bare, empty])
    assert isinstance(found[0], Prompt)
    reasons = [reject.reason for reject in found[1:]]
    assert reasons[:2] == ["no_messages", "no_messages"]
    assert all(isinstance(reject, RowRejected) for reject in found[1:])


def test_rows_of_no_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"rows\.jsonl"):
        prompts(tmp_path, [{"a": 1}, {"b": "c"}])


def ask(row: dict[str, Any]) -> Any:
    """Make a conversation without an answer of a row of no known shape."""
    return [user(row["q"])]


def test_a_function_makes_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "2+2?"}\n')
    rows = PromptRows.open(str(tmp_path / "rows.jsonl"), RowFormat(transform=ask))
    (prompt,) = rows.read(0, 1)
    assert parts(prompt) == ([user("2+2?")], None)
