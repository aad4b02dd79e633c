"""Nothing that a row holds ends a run or passes in silence: each is dropped by file, row and reason, and its
neighbours are trained."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
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
from miles.data.stream import stages
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.types import StepReport
from miles.errors import DataError
from tests.support.chatml import CHATML

SECRET = "zebra"
"""Stands in each broken row, and may stand in no list of rejects."""
SECRET_TEXT = SECRET + " crossing " + SECRET * 40
MAX_TOKENS = 512


def chat(answer: Any, question: Any = "2+2?", **further: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **further,
    }


def line(row: Any) -> bytes:
    return json.dumps(row).encode()


GOOD = line(chat("4"))


@dataclass(frozen=True)
class Outcome:
    """What a run over some files came to."""

    ledger: Ledger
    reports: list[StepReport]
    trained: list[int]
    """ids of the rows trained, sorted"""
    text: str
    """of rejects.jsonl"""

    @property
    def rejects(self) -> list[tuple[str, int, str]]:
        """(file's name, row, reason)"""
        entries = [json.loads(line) for line in self.text.splitlines()]
        assert all(set(entry) == {"source", "file", "row", "reason", "detail"} for entry in entries)
        return [(Path(entry["file"]).name, entry["row"], entry["reason"]) for entry in entries]

    @property
    def dropped(self) -> list[tuple[int, str]]:
        """(row, reason), of one file"""
        return [(row, reason) for _, row, reason in self.rejects]


def config_of(
    files: Sequence[Path], tokenizer: Path, form: RowFormat | None = None, **encode: Any
) -> DataConfig:
    return DataConfig(
        sources=tuple(
            SourceConfig(file.name.split(".")[0], (str(file),), form or RowFormat())
            for file in files
        ),
        order=OrderConfig(batch_size=3),
        encode=EncodeConfig(str(tokenizer), max_sample_tokens=MAX_TOKENS, **encode),
        pack=PackConfig(dp_size=2, max_tokens_per_gpu=2 * MAX_TOKENS),
    )


def run(config: DataConfig, folder: Path) -> Outcome:
    """Every row once, as a run would take it; checks what must hold whatever the rows are."""
    manifest = build_manifest(config.sources)
    path = folder / "run" / "rejects.jsonl"
    limits = RejectLimits(1.0, fatal_reasons=RejectLimits.of(config).fatal_reasons)
    ledger = Ledger(manifest, str(path), limits)
    reports, trained = [], []
    for step in stages.local_steps(manifest, config):
        ledger.commit(step.index, step.report.rows)
        reports.append(step.report)
        trained += [
            int(row)
            for rank in step.micro_batches
            for one in rank
            for row in one.row_ids
            if row >= 0
        ]
    totals = ledger.totals()
    for counts in totals.values():
        assert counts["read"] == sum(
            n for key, n in counts.items() if key not in ("read", "truncated")
        )
    assert sum(counts["read"] for counts in totals.values()) == manifest.num_rows
    dropped = [reject.row_id for report in reports for reject in report.rows.rejects]
    assert sorted(trained + dropped) == list(range(manifest.num_rows))
    assert SECRET not in path.read_text()
    return Outcome(ledger, reports, sorted(trained), path.read_text())


def run_lines(
    lines: Sequence[bytes], folder: Path, tokenizer: Path, form: RowFormat | None = None
) -> Outcome:
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    return run(config_of([file], tokenizer, form), folder)


BAD = {
    "not JSON": (b'{"messages": ' + SECRET.encode(), "malformed_json"),
    "a line that is cut": (line(chat(SECRET))[:-5], "malformed_json"),
    "bad UTF-8": (b'{"messages": "' + SECRET.encode() + b'\xff"}', "malformed_json"),
    "half of a UTF-8 character": (line(chat(SECRET))[:-4] + b"\xe4\xb8" + b'"}]}', "malformed_json"),
    "UTF-16": (json.dumps(chat(SECRET)).replace(" ", "").encode("utf-16-le"), "malformed_json"),
    "two objects": (line(chat(SECRET)) * 2, "malformed_json"),
    "lone surrogate in an answer": (b'{"messages": [{"role": "user", "content": "a"}, '
                                    b'{"role": "assistant", "content": "zebra \\ud83d"}]}', "bad_message"),
    "lone surrogate in a question": (b'{"messages": [{"role": "user", "content": "\\udc00 zebra"}, '
                                     b'{"role": "assistant", "content": "a"}]}', "bad_message"),
    "a list": (line([chat(SECRET)]), "not_an_object"),
    "text": (line(SECRET), "not_an_object"),
    "a number": (b"17", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "NaN": (b"NaN", "not_an_object"),
    "no messages": (line({"other": SECRET}), "no_messages"),
    "an empty object": (b"{}", "no_messages"),
    "null messages": (line({"messages": None, "id": SECRET}), "no_messages"),
    "empty messages": (line({"messages": [], "id": SECRET}), "no_messages"),
    "messages are a number": (line({"messages": 3, "id": SECRET}), "no_messages"),
    "a message is text": (line({"messages": [SECRET]}), "bad_message"),
    "a message is null": (line({"messages": [None], "id": SECRET}), "bad_message"),
    "unknown role": (line({"messages": [{"role": SECRET, "content": "a"}]}), "unknown_role"),
    "a role that is a list": (line({"messages": [{"role": [SECRET], "content": "a"}]}), "unknown_role"),
    "no role": (line({"messages": [{"content": SECRET}]}), "unknown_role"),
    "null content": (line(chat(None, SECRET)), "bad_message"),
    "null question": (line(chat(SECRET, None)), "bad_message"),
    "content is a number": (line(chat(17, SECRET)), "bad_message"),
    "content is true": (line(chat(True, SECRET)), "bad_message"),
    "content is an object": (line(chat({"text": SECRET})), "bad_message"),
    "content is NaN": (line(chat(float("nan"), SECRET)), "bad_message"),
    "content is a huge integer": (line(chat(SECRET))[:-3] + b', "content": ' + b"9" * 5_000 + b"}]}", "malformed_json"),
    "only a question": (line({"messages": [{"role": "user", "content": SECRET}]}), "nothing_to_train"),
    "an answer that is not to be trained": (
        line({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": SECRET, "weight": 0}]}),
        "nothing_to_train",
    ),
    "too long": (line(chat(SECRET * 2_000)), "too_long"),
    "5 MB": (line(chat(SECRET * 1_000_000)), "too_long"),
    "brackets without end": (b"[" * 100_000, "malformed_json"),
    "nested too deeply for JSON": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed_json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_broken_row_is_named_and_its_neighbours_are_trained(
    name: str, tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    row, reason = BAD[name]
    got = run_lines([GOOD, GOOD, GOOD, GOOD, row, GOOD], tmp_path, chatml_tokenizer_folder)
    assert got.rejects == [("rows.jsonl", 4, reason)]
    assert got.ledger.totals() == {"rows": {"read": 6, "trained": 5, reason: 1}}
    assert got.trained == [0, 1, 2, 3, 5]
    assert got.reports[1].rows.rejects[0].position == 1


HARMLESS = {
    "a null character": line(chat("a\u0000b", "\u0000")),
    "duplicate keys, the last of which counts": b'{"messages": 3, "messages": '
    + GOOD.split(b": ", 1)[1],
    "NaN and infinity in another column": GOOD[:-1] + b', "score": NaN, "other": [-Infinity]}',
    "a huge integer, though still one": GOOD[:-1] + b', "id": ' + b"9" * 4_000 + b"}",
    "a number beyond a float": GOOD[:-1] + b', "score": 1e999}',
    "nested deeply in another column": GOOD[:-1] + b', "other": ' + b"[" * 500 + b"]" * 500 + b"}",
    "escaped pairs of surrogates": line(chat("\U0001d11e")),
    "a byte-order mark amid the file": b"\xef\xbb\xbf" + GOOD,
    "white space": b" \t" + GOOD + b" ",
    "control characters": line(chat("\x1b[0m \x07 \u2028 \ufeff")),
    "noncharacters": line(chat("\ufdd0 \ufffe")),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_an_odd_row_that_is_none_the_worse_is_trained(
    name: str, tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    got = run_lines([GOOD, HARMLESS[name], GOOD], tmp_path, chatml_tokenizer_folder)
    assert got.text == ""
    assert got.trained == [0, 1, 2]


@pytest.mark.parametrize("depth", [90, 200, 400, 480, 700, 900, 960])
def test_nesting_that_only_our_own_functions_cannot_follow(
    depth: int, tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    """It is trained or dropped, but ends nothing, neither in a run nor in `prepare`."""
    deep = '{"a": [' * (depth // 2) + f'"{SECRET}"' + "]}" * (depth // 2)
    tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]'
    rows = [
        GOOD.decode(),
        GOOD.decode()[:-3] + f', "more": {deep}}}]}}',
        GOOD.decode()[:-1] + f', "tools": {tools}}}',
        GOOD.decode()[:-1] + f', "tools": {json.dumps(tools)}}}',
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    config = config_of([file], chatml_tokenizer_folder)
    got = run(config, tmp_path)
    assert 0 in got.trained
    assert {reason for _, reason in got.dropped} <= {
        "malformed_json",
        "bad_message",
        "template_error",
        "too_long",
    }

    manifest = build_manifest(config.sources)
    plan, formats = stages.make_plan(manifest, config), stages.source_formats(manifest)
    prepared = [
        row
        for ref in plan.windows(0)
        for raw in stages.read_window(manifest, plan, ref, 0)
        for row in stages.prepare_steps(raw, formats, stages.encoder_of(config.encode)).to_pylist()
    ]
    assert sorted(row_id for row in prepared for row_id in row["sample_row_ids"]) == got.trained
    assert [reject["position"] for row in prepared for reject in row["rejects"]] == [
        row % 3 for row, _ in got.dropped
    ]


ODD_TEXTS = (
    *(
        "",
        "a",
        " ",
        "\n",
        "\r\n",
        "\u0000",
        "\ud83d",
        "\U0001d11e",
        "\u2028",
        "\ufeff",
        "\ufdd0",
        "e\u0301",
    ),
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n",
        "<think>a",
        "</think>",
        "<tool_response>",
    ),
    *(
        "{{ 7 }}",
        "{% raw %}",
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": "\\"\\\\ud800\\""}',
        "[]",
    ),
)


def test_odd_rows_by_the_thousand(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Many share a shape and differ in what their strings make the template do."""
    random = Random(0)

    def text() -> str:
        return "".join(random.choices(ODD_TEXTS, k=random.randint(0, 3)))

    roles = ("user", "assistant", "assistant", "tool", "function_call")
    rows = [
        {
            "messages": [
                {"role": random.choice(roles), "content": text()}
                for _ in range(random.randint(1, 4))
            ]
        }
        for _ in range(3_000)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, *(line(row) for row in rows)]))
    config = config_of([file], chatml_tokenizer_folder)
    got = run(dataclasses.replace(config, order=OrderConfig(batch_size=500)), tmp_path)
    assert len(got.trained) > 1_000
    assert len(got.dropped) > 500
    with_surrogate = {
        number
        for number, row in enumerate(rows, 1)
        if any("\ud83d" in turn["content"] for turn in row["messages"])
    }
    assert not with_surrogate & set(got.trained)


def test_what_is_no_row_counts_for_none(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """A byte-order mark, CRLF and blank lines; the row's number is that among the rows."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\r\n \t\r\n\n".join([GOOD, b"{broken", GOOD]) + b"\r\n\r\n"
    )
    got = run(config_of([file], chatml_tokenizer_folder), tmp_path)
    assert got.rejects == [("rows.jsonl", 1, "malformed_json")]
    assert got.ledger.totals() == {"rows": {"read": 3, "trained": 2, "malformed_json": 1}}


def test_types_that_drift_from_row_to_row(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    rows = [chat("a"), chat(7), chat("b", tools="[]"), chat("c", tools=[]), chat("d", tools=4), {"messages": json.dumps(
        chat("e")["messages"])}, {"messages": SECRET}, {"messages": {"0": SECRET}}]  # fmt: skip
    got = run_lines([line(row) for row in rows], tmp_path, chatml_tokenizer_folder)
    assert [row for row, _ in got.dropped] == [1, 4, 6, 7]
    assert [reason for _, reason in got.dropped[:2]] == ["bad_message", "bad_message"]
    assert got.trained == [0, 2, 3, 5]


@pytest.mark.parametrize("text", ["", "a"], ids=["no token", "one token"])
def test_text_of_which_no_token_can_be_predicted(
    text: str, tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    """A label is the next token of the same sample: one token alone has none. Unless an end is put behind it."""
    rows = [line({"text": one}) for one in ("a plain text", text, "and another")]
    got = run_lines(rows, tmp_path, chatml_tokenizer_folder, RowFormat("text"))
    assert {0, 2} <= set(got.trained)
    assert got.dropped in ([(1, "nothing_to_train")], [(1, "no_messages")], [])
    assert all(report.content.num_trained_tokens > 0 for report in got.reports)
    if text == "":
        assert got.trained == [0, 2]


def test_a_row_of_50_mb_is_dropped_at_once(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Without being tokenised: that alone takes a quarter of a minute."""
    got = run_lines(
        [GOOD, line(chat(SECRET * 10_000_000)), GOOD], tmp_path, chatml_tokenizer_folder
    )
    assert got.dropped == [(1, "too_long")]
    assert got.trained == [0, 2]
    assert got.reports[0].timing.stage_seconds["encode"] < 5


def test_a_template_that_raises(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Whether with a text of its own, or with one that quotes the row, be it short or long."""
    template = (
        "{%- for message in messages %}"
        "{%- if 'odd' in message.content %}{{- raise_exception('no odd rows, please') }}{%- endif %}"
        "{%- if 'zebra' in message.content %}{{- raise_exception('cannot say: ' + message.content) }}{%- endif %}"
        "{%- endfor %}" + CHATML
    )
    contents = ["odd", SECRET, SECRET_TEXT, f"x\n'{SECRET}' and more"]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, *(line(chat(content)) for content in contents)]))
    got = run(config_of([file], chatml_tokenizer_folder, chat_template=template), tmp_path)
    assert got.dropped == [(row, "template_error") for row in (1, 2, 3, 4)]
    assert "no odd rows, please" in got.text


def test_a_step_of_nothing_but_broken_rows(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Steps keep their rows: the second step trains nothing, and is a step all the same."""
    got = run_lines([GOOD] * 3 + [b"{", b"[", b"null"] + [GOOD], tmp_path, chatml_tokenizer_folder)
    assert [report.content.num_samples for report in got.reports] == [3, 0, 1]
    assert got.reports[1].content.num_trained_tokens == 0
    assert got.dropped == [(3, "malformed_json"), (4, "malformed_json"), (5, "not_an_object")]


def test_counts_of_each_source(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    first, second = tmp_path / "one.jsonl", tmp_path / "two.jsonl.gz"
    first.write_bytes(b"\n".join([GOOD, b"{", GOOD, GOOD]))
    second.write_bytes(
        gzip.compress(b"\n".join([b"17", GOOD, line(chat(SECRET * 2_000)), line(chat(None))]))
    )
    got = run(config_of([first, second], chatml_tokenizer_folder), tmp_path)
    assert got.ledger.totals() == {
        "one": {"read": 4, "trained": 3, "malformed_json": 1},
        "two": {"read": 4, "trained": 1, "not_an_object": 1, "too_long": 1, "bad_message": 1},
    }
    assert [entry[:2] for entry in got.rejects] == [
        ("one.jsonl", 1),
        ("two.jsonl.gz", 0),
        ("two.jsonl.gz", 2),
        ("two.jsonl.gz", 3),
    ]


def test_what_is_cut_is_counted(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    first, second = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    first.write_bytes(b"\n".join([GOOD, GOOD]))
    second.write_bytes(
        b"\n".join([line(chat("long " * 2_000)), GOOD, b"{", line(chat("long " * 3_000))])
    )
    got = run(
        config_of([first, second], chatml_tokenizer_folder, too_long="truncate_end"), tmp_path
    )
    assert [report.rows.truncated for report in got.reports] == [(0, 1), (0, 1)]
    assert got.ledger.totals() == {
        "one": {"read": 2, "trained": 2},
        "two": {"read": 4, "trained": 3, "truncated": 2, "malformed_json": 1},
    }


def test_a_row_too_long_is_an_error_where_it_is_to_be_one(
    tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"{", GOOD, GOOD, line(chat(SECRET * 2_000))]))
    with pytest.raises(
        DataError, match=r"row 4 \(from 0\) of .*rows\.jsonl .*--too-long"
    ) as caught:
        run(config_of([file], chatml_tokenizer_folder, too_long="error"), tmp_path)
    assert SECRET not in str(caught.value)


def test_resumed_at_every_step_the_same_counts_and_the_same_list(
    tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    """Killed after any step, resumed from any checkpoint before it; two epochs, shuffled."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(b"\n".join([GOOD, b"{", GOOD, b"17", GOOD, GOOD, line(chat("long " * 2_000))]))
    two.write_bytes(b"\n".join([line(chat(None)), GOOD, b"[]", GOOD]))
    config = config_of([one, two], chatml_tokenizer_folder, too_long="truncate_end")
    config = dataclasses.replace(
        config, order=OrderConfig(2, seed=3, shuffle=True, window_rows=6, num_epoch=2)
    )
    manifest = build_manifest(config.sources)

    def train(
        path: Path, saved: int, killed: int, totals: Any, start_row: int
    ) -> list[tuple[Any, int]]:
        """Totals and next row as of each step, from `saved` on."""
        ledger = Ledger(manifest, str(path), RejectLimits(1.0), totals, saved)
        states = [(ledger.totals(), start_row)]
        for step in stages.local_steps(manifest, config, start_row):
            if step.index == killed:
                break
            ledger.commit(step.index, step.report.rows)
            states.append((json.loads(json.dumps(ledger.totals())), step.next_row))
        return states

    whole = train(tmp_path / "whole.jsonl", 0, -1, None, 0)
    text = (tmp_path / "whole.jsonl").read_text()
    num_steps = len(whole) - 1
    assert num_steps == 12
    assert len(text.splitlines()) == 4
    assert whole[-1][0]["two"] == {"read": 8, "trained": 4, "bad_message": 2, "not_an_object": 2}
    assert whole[-1][0]["one"]["truncated"] == 2
    for killed in range(num_steps + 1):
        for saved in {0, killed // 2, killed}:
            path = tmp_path / f"{saved}-{killed}.jsonl"
            assert train(path, 0, killed, None, 0) == whole[: killed + 1]
            assert train(path, saved, -1, *whole[saved])[-1] == whole[-1]
            assert path.read_text() == text


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


def test_columns_beside_the_conversation_that_json_has_no_type_for(
    tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    deep: Any = "x"
    kind = pa.string()
    for _ in range(30):
        deep, kind = [deep], pa.list_(kind)
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


def test_a_date_that_python_has_not_costs_its_row_alone(
    tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    table = pa.table(
        {
            "messages": pa.array([chat(answer)["messages"] for answer in "abc"], MESSAGES),
            "day": pa.array([0, 10**7, 1], pa.date32()),
        }
    )
    got = run_table(table, tmp_path, chatml_tokenizer_folder)
    assert got.dropped == [(1, "malformed_json")]
