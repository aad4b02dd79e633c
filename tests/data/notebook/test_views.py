"""A data set in a notebook: rows by number, previews by what one looks for, steps, and their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles.data import prepare
from miles.data.notebook import dataset
from miles.data.notebook.dataset import Prepared
from miles.data.notebook.python_words import in_python
from miles.errors import ConfigError, MilesError

NUM_ROWS = 60


def row(number: int) -> dict[str, Any]:
    role = "assistant" if number % 10 else "npc"
    return {
        "messages": [
            {"role": "user", "content": f"What is {number}? " * (1 + number % 3)},
            {"role": role, "content": f"It is {number}. " * (1 + number % 7)},
        ]
    }


@pytest.fixture(scope="module")
def data(chatml_tokenizer_folder: Path) -> Prepared:
    rows = [row(number) for number in range(NUM_ROWS)]
    return prepare("chat", source=rows, tokenizer=str(chatml_tokenizer_folder))


def test_rows_have_numbers(data: Prepared) -> None:
    assert len(data) == NUM_ROWS
    assert data[3].raw == row(3)
    assert data[3].messages == row(3)["messages"]
    assert data[-1].row_id == NUM_ROWS - 1
    assert [item.row_id for item in data[2:8:3]] == [2, 5]
    assert [item.row_id for item in data] == list(range(NUM_ROWS))
    assert (data[0].reason, data[0].input_ids, data[3].reason) == ("unknown_role", None, None)
    assert '"npc"' in data[0].detail
    with pytest.raises(IndexError, match="there is no row 60: the data set has 60 rows"):
        data[NUM_ROWS]


def test_all_of_it_prints_in_a_line(data: Prepared) -> None:
    steps = data.steps(batch_size=16, max_tokens_per_gpu=8192)
    step = next(iter(steps))
    shown = [data, data[0], data[3], data[:3], data.preview(2), data.ledger, steps, step]
    for thing in shown:
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 120
    assert repr(data[0]) == "Row 0: dropped, unknown_role (chat row 0)"
    assert repr(data.ledger) == "6 of 60 rows dropped: 6 unknown_role"
    assert repr(step).startswith("Step 0: 16 rows, ")


def test_where_finds_rows(data: Prepared) -> None:
    every = {item.row_id: item for item in data if item.encoded is not None}
    longest = data.preview(4, where="longest")
    lengths = sorted((item.num_tokens for item in every.values()), reverse=True)
    assert [item.num_tokens for item in longest] == lengths[:4]
    assert "all 60 rows" in longest.to_text()

    least = data.preview(4, where="least_trained")
    shares = sorted(item.num_trained_tokens / item.num_tokens for item in every.values())
    assert [item.num_trained_tokens / item.num_tokens for item in least] == shares[:4]

    drawn = data.preview(5, where="random", seed=3)
    assert [item.row_id for item in drawn] == [
        item.row_id for item in data.preview(5, where="random", seed=3)
    ]
    assert list(drawn) != list(data.preview(5, where="random", seed=4))
    assert [item.row_id for item in data.preview(rows=[7, -1, 0])] == [7, 59, 0]
    assert [item.row_id for item in data.preview(2)] == [1, 2]


def test_dropped_rows_say_why_and_what_to_do(data: Prepared) -> None:
    dropped = data.preview(2, where="dropped")
    assert [item.row_id for item in dropped] == [0, 10]
    for text in (dropped.to_text(), dropped._repr_html_().replace("&quot;", '"')):
        assert 'its role "npc" is not known; role_names={"npc": "ROLE"}' in text
        assert 'What to do: say what the role means with role_names={"NAME": "assistant"}.' in text
        assert "What is 10?" in text
    assert "npc (6 rows); say what each name means" in " ".join(data.to_text().split())
    assert 'role_names={"npc": "user"}' in data.to_text()


def test_a_sample_is_named_as_one(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SAMPLE_ROWS", 20)
    monkeypatch.setattr(data, "_sample", None)
    assert "a sample of 20 rows of 60" in data.preview(1, where="longest").to_text()
    monkeypatch.setattr(data, "_sample", None)


def test_steps_have_a_length_and_are_refused_at_once(data: Prepared) -> None:
    steps = data.steps(batch_size=16, max_tokens_per_gpu=8192, num_epoch=2)
    assert len(steps) == 8 == len(list(steps)) == len(list(steps))
    assert sum(step.num_rows for step in steps) == 2 * NUM_ROWS
    assert len(data.steps(batch_size=16, max_tokens_per_gpu=8192, start_row=32)) == 2
    assert "without Ray" in steps.to_text()

    step = next(iter(steps))
    sample = steps.preview(step, 1)[0]
    plain = data[sample.row_id]
    assert sample.input_ids is not None
    assert plain.input_ids is not None
    assert sample.input_ids.tolist() == plain.input_ids.tolist()
    assert sample.loss_mask is not None
    assert plain.loss_mask is not None
    assert sample.loss_mask.tolist() == plain.loss_mask.tolist()

    for wrong, words in (
        ({"batch_size": 0}, "batch_size= must be positive, not 0"),
        ({"start_row": 3}, "no step begins at row 3"),
        ({"max_tokens_per_gpu": 100}, "max_sample_tokens=8192 exceeds"),
    ):
        settings: dict[str, Any] = {"batch_size": 16, "max_tokens_per_gpu": 8192, **wrong}
        with pytest.raises(ConfigError, match=words):
            data.steps(**settings)


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("--max-sample-tokens 9000 exceeds", "max_sample_tokens=9000 exceeds"),
        ("raise --max-sample-tokens, or", "raise max_sample_tokens=, or"),
        ("--too-long truncate_end cuts it", 'too_long="truncate_end" cuts it'),
        ("--too-long must be one of", "too_long= must be one of"),
        ("--input-key chat: no such", 'messages_key="chat": no such'),
        ("""--role-names '{"A": "user"}'""", """role_names={"A": "user"}"""),
        ("or --overwrite to replace", "or overwrite=True to replace"),
        ("Take it: --input-key chat. The", 'Take it: messages_key="chat". The'),
        ("--transform rows:f: no module", 'transform="rows:f": no module'),
        ("--transform a.b:<lambda> makes", 'transform="a.b:<lambda>" makes'),
        ("--transform takes package.module", "transform= takes package.module"),
        ("a line of -- dashes", "a line of -- dashes"),
    ],
)
def test_errors_speak_of_arguments(flags: str, arguments: str) -> None:
    assert in_python(flags) == arguments


def test_a_notebook_shows_one_paragraph(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MilesError) as raised:
        data.preview(where="nowhere")
    (paragraph,) = raised.value._render_traceback_()  # type: ignore[attr-defined]
    assert paragraph == f"ConfigError: {raised.value}"
    monkeypatch.setenv("MILES_DEBUG", "1")
    with pytest.raises(MilesError) as raised:
        data.preview(where="nowhere")
    assert not hasattr(raised.value, "_render_traceback_")


def test_a_command_speaks_of_flags(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "is_in_python", False)
    assert "--role-names" in data.to_text()
    with pytest.raises(ConfigError, match="--max-sample-tokens 8192"):
        data.steps(batch_size=1, max_tokens_per_gpu=100)


def test_wrong_arguments_are_refused_in_words(data: Prepared) -> None:
    for index in ("a", None, [1, 2], True, 1.0):
        with pytest.raises(TypeError, match=r"takes a whole number or a slice, not .*rows=\["):
            data[index]  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="preview: seed must not be negative, not -1"):
        data.preview(where="random", seed=-1)
    with pytest.raises(ConfigError, match=r"^batch_size= must be positive, not 0$"):
        data.steps(batch_size=0, max_tokens_per_gpu=8192)
    with pytest.raises(ConfigError, match="no step begins at row 1,000"):
        data.steps(batch_size=2, max_tokens_per_gpu=8192, start_row=1000)
    for arguments in ({"dataset": ""}, {"tokenizer": ""}):
        call = {"dataset": "x", "tokenizer": "x", **arguments}
        with pytest.raises(ConfigError, match="is empty, such as a variable"):
            prepare(source="rows.jsonl", **call)
