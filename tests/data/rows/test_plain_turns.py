"""Rows of tables as plain turns: whatever the table, each row comes to what its JSON does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, RowFormat, SourceConfig
from miles.data.files import plain_rows
from miles.data.files.manifest import build_manifest
from miles.data.files.plain_rows import raw_rows
from miles.data.files.read import read_rows
from miles.data.files.row_json import rows_to_json
from miles.data.rejecting import or_rejected
from miles.data.rows.messages_parquet import messages_table
from miles.data.rows.normalize import MESSAGES, normalize
from miles.data.stream import stages
from miles.data.stream.row_outcomes import normalize_rows, raw_rows_of
from miles.data.stream.step_tables import list_values
from miles.data.types import Conversation
from tests.support.row_cases import facts_of

TEXT = pa.string()
PLAIN = pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))
TURNS = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
BROKEN, NOT_UTF_8 = b"\x01BROKEN", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9"
"""What stands in a text while a table is made, and what stands there then."""

NAMES = ("messages", "conversations", "conversation", "Conversations", "MESSAGES", "chat", "data")
TEXTS = (
    *("2+2?", "4", "", "Straße 🌲", "\x00\n", "\\ud83d", '{"a": "\\ud83d"}', BROKEN.decode()),
    *("x</tool_response>", "<tool_response>\n1\n</tool_response><tool_response>2</tool_response>"),
    *('{"name": "add", "arguments": {"a": 2}}', '{"name": "f", "arguments": {"a": "\\ud83d"}}'),
)
ROLES = (
    *("user", "assistant", "human", "gpt", "system", "tool", "tool_call", "function_call", "npc"),
    *("Human", "GPT", "nobody", "", BROKEN.decode()),
)
FURTHER_FIELDS = {
    "weight": (pa.int8(), (0, 1, 2)),
    "name": (TEXT, ("Ann", "")),
    "tags": (pa.list_(TEXT), ([], ["a"])),
    "speaker": (TEXT, ("user", "gpt")),
    "text": (TEXT, ("4", "5")),
    "inner": (pa.struct([("a", TEXT)]), ({}, {"a": "b"})),
}
SIDE_COLUMNS: dict[str, tuple[pa.DataType, Sequence[Any]]] = {
    "id": (pa.int64(), (7,)),
    "note": (pa.large_string(), ("a", BROKEN.decode())),
    "tag": (pa.dictionary(pa.int8(), TEXT), ("a", BROKEN.decode())),
    "view": (pa.string_view(), ("a", BROKEN.decode(), f"a text that is long, {BROKEN.decode()}")),
    "score": (pa.float64(), (1.5, float("nan"))),
    "price": (pa.decimal128(10, 2), (1, 2)),
    "day": (pa.date64(), (0, 10**17)),  # the year 10,000 is no date of Python's
    "when": (pa.timestamp("ns", "UTC"), (0, 1)),
    "map": (pa.map_(TEXT, TEXT), ([("a", "b")], [("a", "b"), ("a", "c")])),
    "places": (pa.list_(pa.struct([("x", pa.float32()), ("tools", TEXT)])), ([], [{"x": 1.0}])),
    "system": (TEXT, ("Be brief.", "")),
    "System_Prompt": (TEXT, ("Be brief.",)),
    "tools": (TEXT, ('[{"name": "add"}]', "none")),
    "functions": (pa.list_(TEXT), (['{"name": "add"}'], [])),
    "chat_template_kwargs": (TEXT, ('{"enable_thinking": false}', "[]")),
    "metadata": (TEXT, ('{"tools": [{"name": "add"}]}', '{"score": 1}')),
    "metadata (object)": (
        pa.struct([("tools", TEXT), ("a", TEXT)]),
        ({"tools": '[{"name": "f"}]'}, {}),
    ),
    "image": (TEXT, ("a.png", "")),
    "images": (pa.list_(TEXT), (["a.png"], [])),
    "dialog": (PLAIN, (TURNS, [])),
    "conversation": (PLAIN, (TURNS[:1] + TURNS, [], [None])),
    "extra": (pa.struct([("tools", TEXT)]), ({"tools": '[{"name": "add"}]'}, {})),
}
FORMATS: tuple[dict[str, str], ...] = (
    *({}, {}, {}, {}),
    {"messages": "messages"},
    {"messages": "Conversations"},
    {"messages": "conversations", "tools": "extra.tools"},
    {"tools": "note", "system": "view"},
    {"messages": "extra.turns"},
    {"tools": "messages"},
)
ROLE_NAMES = ({}, {"npc": "assistant"}, {"GPT": "user", "nobody": "tool_call"})
TEXT_TYPES = (TEXT, pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), TEXT))
LIST_TYPES = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)


def often(value: Any, *others: Any) -> st.SearchStrategy[Any]:
    """Draw a value mostly, and now and then another."""
    return st.sampled_from([value] * 9 * len(others) + list(others))


@st.composite
def tables(draw: st.DrawFn) -> pa.RecordBatch:
    """Draw a table with turns in a column, and others beside it."""
    num_rows = draw(st.integers(1, 5))
    columns = {draw(st.sampled_from(NAMES)): draw(columns_of_turns(num_rows))}
    for name in draw(st.lists(st.sampled_from(sorted(SIDE_COLUMNS)), max_size=3, unique=True)):
        kind, values = SIDE_COLUMNS[name]
        name = name.partition(" ")[0]
        rows = st.lists(often(None, *values), min_size=num_rows, max_size=num_rows)
        columns.setdefault(name, pa.array(draw(rows), kind))
    return with_broken_text(pa.record_batch(columns))


@st.composite
def columns_of_turns(draw: st.DrawFn, num_rows: int) -> pa.Array:
    """Draw a column of turns: most of them a role and a text."""
    text = draw(st.sampled_from(TEXT_TYPES))
    role, content = draw(st.sampled_from([("from", "value"), ("role", "content")]))
    fields = {"from": text, "value": text, role: text, content: text}
    values = {"from": st.none(), "value": st.none()}
    for key in draw(st.lists(st.sampled_from(sorted(FURTHER_FIELDS)), max_size=2, unique=True)):
        fields[key] = FURTHER_FIELDS[key][0]
        values[key] = often(None, *FURTHER_FIELDS[key][1])
    values[content] = often("2+2?", None, *TEXTS)

    question = st.fixed_dictionaries(values | {role: often("human", None, *ROLES)})
    answer = st.fixed_dictionaries(values | {role: often("gpt", *ROLES)})
    turns = st.tuples(question, question | st.none(), question, answer)
    row = st.tuples(turns, often(2, 0, 1, 3)).map(lambda drawn: list(drawn[0][drawn[1] :]))
    rows = st.lists(
        often(row, st.none(), st.just([])).flatmap(lambda strategy: strategy),
        min_size=num_rows,
        max_size=num_rows,
    )
    list_of = draw(st.sampled_from(LIST_TYPES))
    kind = list_of(pa.struct(list(fields.items())))
    return pa.array(draw(rows), kind)


def with_broken_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch with bytes that are not UTF-8 where a text says so."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue().to_pybytes().replace(BROKEN, NOT_UTF_8)
    return pa.ipc.open_stream(content).read_next_batch()


def by_json(batch: pa.RecordBatch, numbers: Any, format: RowFormat) -> list[Any]:
    payloads = rows_to_json(batch, numbers)
    return [facts_of(or_rejected(normalize, payload, format)) for payload in payloads]


def directly(batch: pa.RecordBatch, numbers: Any, format: RowFormat) -> list[Any]:
    rows = raw_rows(batch, numbers, format)
    assert rows.turns.is_null().equals(rows.payloads.is_valid())
    return [facts_of(row) for row in normalize_rows(rows, np.zeros(len(rows), np.int32), [format])]


def num_plain(batch: pa.RecordBatch, format: RowFormat = MESSAGES) -> int:
    return len(batch) - raw_rows(batch, np.arange(len(batch)), format).turns.null_count


@settings(max_examples=250, deadline=None)
@given(
    batch=tables(),
    columns=st.sampled_from(FORMATS),
    roles=st.sampled_from(ROLE_NAMES),
    begin=st.integers(0, 2),
    step=st.integers(1, 2),
)
def test_a_row_comes_to_what_its_json_does(
    batch: pa.RecordBatch,
    columns: dict[str, str],
    roles: dict[str, str],
    begin: int,
    step: int,
) -> None:
    format = RowFormat("messages", columns, roles)
    numbers = np.arange(begin, batch.num_rows, step)
    assert directly(batch, numbers, format) == by_json(batch, numbers, format)


def test_turns_may_be_the_tools_under_another_case() -> None:
    batch = pa.record_batch({"MESSAGES": pa.array([TURNS], PLAIN)})
    format = RowFormat("messages", {"tools": "messages"})
    assert directly(batch, np.arange(1), format) == by_json(batch, np.arange(1), format)


@pytest.mark.parametrize("columns", FORMATS[3:])
def test_each_column_beside_turns_has_its_say(columns: dict[str, str]) -> None:
    format = RowFormat("messages", columns)
    for label, (kind, values) in SIDE_COLUMNS.items():
        name = label.partition(" ")[0]
        side = [None, *values]
        for turns in ("messages", "Conversations", "dialogue"):
            batch = pa.record_batch(
                {turns: pa.array([TURNS] * len(side), PLAIN), name: pa.array(side, kind)}
            )
            for row in range(len(side)):  # one text that is not UTF-8 is enough for a batch
                single = with_broken_text(batch.slice(row, 1))
                numbers = np.arange(1)
                assert directly(single, numbers, format) == by_json(single, numbers, format), label


@pytest.mark.parametrize("roles", ROLE_NAMES)
def test_each_turn_has_its_say(roles: dict[str, str]) -> None:
    format = RowFormat("messages", {}, roles)
    pairs = list(product(ROLES, TEXTS))
    turns = [{"from": role, "value": text} for role, text in pairs if BROKEN.decode() not in role]
    for key, (kind, values) in FURTHER_FIELDS.items():
        column = pa.list_(pa.struct([("from", TEXT), ("value", TEXT), (key, kind)]))
        rows = [[*TURNS, turn, TURNS[1] | {key: None}] for turn in turns]
        rows += [[TURNS[0], TURNS[1] | {key: value}] for value in values]
        batch = pa.record_batch({"conversations": pa.array(rows, column)})
        numbers = np.arange(len(batch))
        assert directly(batch, numbers, format) == by_json(batch, numbers, format)
        assert num_plain(batch, format) == len(batch) - len(values)


# --- most rows of usual tables need no JSON -------------------------------------------------------


@pytest.mark.parametrize("list_of", LIST_TYPES)
@pytest.mark.parametrize("text", TEXT_TYPES)
def test_turns_of_any_layout_are_plain(list_of: Any, text: pa.DataType) -> None:
    kind = list_of(pa.struct([("from", text), ("value", text), ("weight", pa.int8())]))
    batch = pa.record_batch({"Conversations": pa.array([TURNS] * 3, kind)})
    assert num_plain(batch) == 3


def test_columns_without_a_say_leave_rows_plain() -> None:
    sides = {
        "note": ["a", None],
        "when": pa.array([0, 1], pa.timestamp("ns")),
        "system": pa.array([None, "Be brief."]),
        "metadata": ['{"score": 1}', None],
        "Metadata": [{"score": 1}, None],
        "data": [[1], [2]],
    }
    batch = pa.record_batch({"conversations": pa.array([TURNS] * 2, PLAIN), **sides})
    assert num_plain(batch) == 1
    assert num_plain(batch.drop_columns("system")) == 2


def test_written_messages_are_plain() -> None:
    messages = ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"})
    rows = [Conversation(messages, None, flags) for flags in ((None, None), (None, True))]
    table = messages_table(np.arange(2), np.zeros(2, np.int32), ["s"], rows)
    (batch,) = table.combine_chunks().to_batches()
    assert num_plain(batch) == 1
    assert directly(batch, np.arange(2), MESSAGES) == [facts_of(row) for row in rows]


def test_a_long_row_is_judged_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_rows, "MAX_PLAIN_BYTES", 600)
    turns = [TURNS, [TURNS[0], {"from": "gpt", "value": "4" * 100}], TURNS]
    column = pa.array(turns, PLAIN)
    assert num_plain(pa.record_batch({"messages": column, "id": [1, 2, 3]})) == 2
    assert num_plain(pa.record_batch({"messages": column, "id": ["", "", "4" * 100]})) == 1
    words = pa.DictionaryArray.from_arrays(pa.array([0, None, 1]), pa.array(["", "4" * 100]))
    assert num_plain(pa.record_batch({"messages": column, "id": words})) == 1
    lists = pa.array(
        [[], None, [{"a": ["4" * 9] * 9}]], pa.list_(pa.struct([("a", pa.list_(TEXT))]))
    )
    assert num_plain(pa.record_batch({"messages": column, "id": lists})) == 1


@pytest.mark.parametrize("window_rows", [4, 64])
def test_a_window_has_rows_of_sources_of_all_shapes(tmp_path: Path, window_rows: int) -> None:
    flagged = pa.list_(pa.struct([("role", TEXT), ("content", TEXT), ("weight", pa.int8())]))
    chat = [{"role": "npc", "content": "Hi"}, {"role": "Model", "content": "Ho", "weight": None}]
    tables = {
        "plain": {"conversations": pa.array([TURNS, [], TURNS[:1], TURNS], PLAIN)},
        "npc": {"chat": pa.array([chat, [*chat, {"role": "who", "content": ""}]] * 2, flagged)},
        "weights": {"messages": pa.array([[*chat[:1], chat[1] | {"weight": 0}], chat], flagged)},
        "alpaca": {"instruction": ["2+2?"] * 3, "output": ["4", None, "5"]},
    }
    sources = []
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=3)
        roles = {"npc": "user"} if name == "npc" else {}
        files = (str(tmp_path / f"{name}.parquet"),)
        sources.append(SourceConfig(name, files, RowFormat(roles=roles)))
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    sources.append(SourceConfig("lines", (str(tmp_path / "lines.jsonl"),)))

    manifest = build_manifest(sources)
    formats = stages.source_formats(manifest)
    order = OrderConfig(batch_size=2, window_rows=window_rows, num_epoch=2)
    plan = stages.make_plan(manifest, DataConfig(tuple(sources), order, EncodeConfig("t")))
    num_rows = num_plain_rows = 0
    for ref in plan.windows(0):
        for table in stages.read_window(manifest, plan, ref, 0):
            row_ids = list_values(table, "row_ids")
            source_ids = list_values(table, "source_ids")
            raw = raw_rows_of(table)
            expected = [
                facts_of(or_rejected(normalize, payload, formats[source_id]))
                for payload, source_id in zip(
                    read_rows(manifest, row_ids), source_ids.tolist(), strict=True
                )
            ]
            assert list(map(facts_of, normalize_rows(raw, source_ids, formats))) == expected
            num_rows += len(raw)
            num_plain_rows += len(raw) - raw.turns.null_count
    assert num_rows == 2 * manifest.num_rows
    assert 0 < num_plain_rows < num_rows
