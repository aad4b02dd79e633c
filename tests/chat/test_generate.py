"""`miles generate`: the same answers for any batch, in the order of the rows, also after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.cli import main
from miles.common import json_lines

ROWS: list[dict[str, Any]] = [
    *(
        {"messages": [{"role": "user", "content": "word " * (n % 5 + 1) + str(n)}]}
        for n in range(9)
    ),
    {"messages": [{"role": "system", "content": "nobody asks"}]},
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
    {"messages": [{"role": "user", "content": "far too long " * 400}]},
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(model: Path, rows: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """Run the command; return the lines of its output."""
    words = ["generate", str(model), "--prompts", str(rows), "--output", str(output)]
    assert main([*words, "--max-new-tokens", "8", *more]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_by_one(small_run: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The answers where each row is alone."""
    output = tmp_path_factory.mktemp("one") / "answers.jsonl"
    return run(small_run, rows, output, "--batch-size", "1")


def test_lines_say_what_was_asked_and_answered(one_by_one: Any) -> None:
    assert [line["row"] for line in one_by_one] == list(range(len(ROWS)))
    first = one_by_one[0]
    assert list(first) == [
        *("row", "messages", "answer", "prompt_tokens", "answer_tokens", "finish")
    ]
    assert first["messages"] == ROWS[0]["messages"]
    assert first["answer"]
    assert (first["finish"], first["answer_tokens"]) == ("length", 8)
    assert [message["content"] for message in one_by_one[10]["messages"]] == ["2+2?", "4", "3+3?"]
    assert "reference" not in one_by_one[10]
    assert one_by_one[9]["reason"].startswith("no_messages")
    assert one_by_one[11]["reason"].startswith("too_long")
    assert [line["finish"] == "rejected" for line in one_by_one] == [
        *[False] * 9,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("batch_size", [2, 4, 32])
def test_the_batch_size_changes_no_answer(
    batch_size: int, one_by_one: Any, small_run: Path, rows: Path, tmp_path: Path
) -> None:
    answers = run(small_run, rows, tmp_path / "a.jsonl", "--batch-size", str(batch_size))
    assert answers == one_by_one
    assert len({line.get("answer") for line in answers}) > 5


def test_a_second_start_goes_on_behind_the_lines(
    one_by_one: Any,
    small_run: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "a.jsonl"
    run(small_run, rows, output)
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    marked = lines[0].replace('"row": 0', '"row":  0')  # would not stay if it were written again
    output.write_text(marked + "".join(lines[1:4]) + lines[4][:20])
    assert run(small_run, rows, output, "--batch-size", "3") == one_by_one
    assert output.read_text() == marked + whole[len(lines[0]) :]

    capsys.readouterr()
    assert run(small_run, rows, output) == one_by_one
    printed = capsys.readouterr().out
    assert f"{output}: 10 answers to 12 rows" in printed
    assert "2 rows cannot be asked" in printed


def test_answers_go_into_a_bucket(
    one_by_one: Any, small_run: Path, rows: Path, bucket: str
) -> None:
    words = ["generate", str(small_run), "--prompts", str(rows), "--output", f"{bucket}/a.jsonl"]
    assert main([*words, "--max-new-tokens", "8"]) == 0
    assert json_lines.read(f"{bucket}/a.jsonl") == one_by_one


def test_answers_of_other_settings_are_not_mixed(
    small_run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.jsonl"
    run(small_run, rows, output)
    before = output.read_text()
    words = ["generate", str(small_run), "--prompts", str(rows), "--output", str(output)]
    assert main([*words, "--max-new-tokens", "9"]) == 2
    assert "holds answers under another max_new_tokens: give another" in capsys.readouterr().err
    (tmp_path / "a.jsonl.settings.json").unlink()
    assert main([*words, "--max-new-tokens", "8"]) == 2
    assert output.read_text() == before


def test_keep_puts_the_reference_beside(small_model: Path, rows: Path, tmp_path: Path) -> None:
    lines = run(small_model, rows, tmp_path / "a.jsonl", "--keep", "--temperature", "1")
    assert [line.get("reference") for line in lines] == [*[None] * 10, "6", None]
    assert len(lines[10]["messages"]) == 3
