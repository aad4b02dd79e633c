"""A broken row ends no run: it is dropped with file, row and reason; the others are trained."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from miles.data.config import OrderConfig, RowFormat
from miles.data.files.manifest import build_manifest
from miles.data.stream import stages
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.tokens.engines import FastokensCore, TiktokenCore
from miles.errors import DataError
from tests.support.bad_rows import (
    GOOD,
    SECRET,
    SECRET_TEXT,
    chat,
    config_of,
    line,
    run,
    run_lines,
)
from tests.support.chatml import CHATML

BAD = {
    "not JSON": (b'{"messages": ' + SECRET.encode(), "malformed_json"),
    "a line that is cut": (line(chat(SECRET))[:-5], "malformed_json"),
    "bad UTF-8": (b'{"messages": "' + SECRET.encode() + b'\xff"}', "malformed_json"),
    "half of a UTF-8 character": (
        line(chat(SECRET))[:-4] + b"\xe4\xb8" + b'"}]}',
        "malformed_json",
    ),
    "UTF-16": (json.dumps(chat(SECRET)).replace(" ", "").encode("utf-16-le"), "malformed_json"),
    "two objects": (line(chat(SECRET)) * 2, "malformed_json"),
    "lone surrogate in an answer": (
        b'{"messages": [{"role": "user", "content": "a"}, '
        b'{"role": "assistant", "content": "zebra \\ud83d"}]}',
        "bad_message",
    ),
    "lone surrogate in a question": (
        b'{"messages": [{"role": "user", "content": "\\udc00 zebra"}, '
        b'{"role": "assistant", "content": "a"}]}',
        "bad_message",
    ),
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
    "a message is text": (line({"messages": [SECRET, {"role": "user"}]}), "bad_message"),
    "a message is null": (line({"messages": [None], "id": SECRET}), "bad_message"),
    "unknown role": (line({"messages": [{"role": "npc", "content": SECRET}]}), "unknown_role"),
    "a role that is a list": (
        line({"messages": [{"role": [SECRET], "content": "a"}]}),
        "unknown_role",
    ),
    "no role": (line({"messages": [{"content": SECRET}]}), "unknown_role"),
    "null content": (line(chat(None, SECRET)), "bad_message"),
    "null question": (line(chat(SECRET, None)), "bad_message"),
    "content is a number": (line(chat(17, SECRET)), "bad_message"),
    "content is true": (line(chat(True, SECRET)), "bad_message"),
    "content is an object": (line(chat({"text": SECRET})), "bad_message"),
    "content is NaN": (line(chat(float("nan"), SECRET)), "bad_message"),
    "content is a huge integer": (
        line(chat(SECRET))[:-3] + b', "content": ' + b"9" * 5_000 + b"}]}",
        "malformed_json",
    ),
    "only a question": (
        line({"messages": [{"role": "user", "content": SECRET}]}),
        "nothing_to_train",
    ),
    "an answer that is not to be trained": (
        line({"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": SECRET, "weight": 0},
        ]}),
        "nothing_to_train",
    ),
    "too long": (line(chat(SECRET * 2_000)), "too_long"),
    "5 MB": (line(chat(SECRET * 1_000_000)), "too_long"),
    "brackets without end": (b"[" * 100_000, "malformed_json"),
    "nested too deeply for JSON": (
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "malformed_json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_broken_row_costs_only_itself(
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
def test_an_odd_row_is_trained(name: str, tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    got = run_lines([GOOD, HARMLESS[name], GOOD], tmp_path, chatml_tokenizer_folder)
    assert got.text == ""
    assert got.trained == [0, 1, 2]


@pytest.mark.parametrize("depth", [90, 200, 400, 480, 700, 900, 960])
def test_deep_nesting_ends_no_run(
    depth: int, tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    """The row is trained or dropped, in a run and in `prepare` alike."""
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
    plan = stages.make_plan(manifest, config)
    encoder = stages.encoder_of(config.encode)
    prepared_rows: list[int] = []
    positions: list[int] = []
    for ref in plan.windows(0):
        for raw in stages.read_window(manifest, plan, ref, 0):
            for step in stages.prepare_steps(raw, manifest, encoder).to_pylist():
                prepared_rows += step["sample_row_ids"]
                positions += [reject["position"] for reject in step["rejects"]]
    assert sorted(prepared_rows) == got.trained
    assert positions == [row % 3 for row, _ in got.dropped]


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


def test_thousands_of_odd_rows(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Many share a shape, and differ in the answers that their strings give to guards."""
    random = Random(0)

    def text() -> str:
        return "".join(random.choices(ODD_TEXTS, k=random.randint(0, 3)))

    roles = ("user", "assistant", "assistant", "tool", "function_call")
    rows = []
    for _ in range(3_000):
        num_turns = random.randint(1, 4)
        turns = [{"role": random.choice(roles), "content": text()} for _ in range(num_turns)]
        rows.append({"messages": turns})

    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, *(line(row) for row in rows)]))
    config = config_of([file], chatml_tokenizer_folder)
    encode = dataclasses.replace(config.encode, empty_answer="train")
    order = OrderConfig(batch_size=500)
    got = run(dataclasses.replace(config, order=order, encode=encode), tmp_path)
    assert len(got.trained) > 1_000
    assert len(got.dropped) > 500
    rows_of_file = [chat("4"), *rows]
    for row_id in got.trained:
        turns = rows_of_file[row_id]["messages"]
        assert not any("\ud83d" in turn["content"] for turn in turns)


def test_blank_lines_are_no_rows(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Nor is a byte-order mark; a row's number is its number among the rows."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\r\n \t\r\n\n".join([GOOD, b"{broken", GOOD]) + b"\r\n\r\n"
    )
    got = run(config_of([file], chatml_tokenizer_folder), tmp_path)
    assert got.rejects == [("rows.jsonl", 1, "malformed_json")]
    assert got.ledger.totals() == {"rows": {"read": 3, "trained": 2, "malformed_json": 1}}


def test_types_that_change_between_rows(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    rows = [
        chat("a"),
        chat(7),
        chat("b", tools="[]"),
        chat("c", tools=[]),
        chat("d", tools=4),
        {"messages": json.dumps(chat("e")["messages"])},
        {"messages": SECRET},
        {"messages": {"0": SECRET}},
    ]

    got = run_lines([line(row) for row in rows], tmp_path, chatml_tokenizer_folder)
    assert [row for row, _ in got.dropped] == [1, 4, 6, 7]
    assert [reason for _, reason in got.dropped[:2]] == ["bad_message", "bad_message"]
    assert got.trained == [0, 2, 3, 5]


@pytest.mark.parametrize("text", ["", "a"], ids=["no token", "one token"])
def test_text_of_at_most_one_token(
    text: str, tmp_path: Path, chatml_tokenizer_folder: Path
) -> None:
    """One token alone has no label, unless the tokenizer puts an end after it."""
    rows = [line({"text": words}) for words in ("a plain text", text, "and another")]
    got = run_lines(rows, tmp_path, chatml_tokenizer_folder, RowFormat("text"))
    assert {0, 2} <= set(got.trained)
    assert got.dropped in ([(1, "nothing_to_train")], [(1, "no_messages")], [])
    assert all(report.content.num_trained_tokens > 0 for report in got.reports)
    if text == "":
        assert got.trained == [0, 2]


def test_a_huge_row_is_not_tokenised(
    tmp_path: Path, chatml_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 MB; to tokenise them takes a quarter of a minute."""
    lengths: list[int] = []
    for engine in (TiktokenCore, FastokensCore):
        ids = engine.ids

        def noted(core: Any, text: str, ids: Any = ids) -> Any:
            lengths.append(len(text))
            return ids(core, text)

        monkeypatch.setattr(engine, "ids", noted)
    got = run_lines(
        [GOOD, line(chat(SECRET * 10_000_000)), GOOD], tmp_path, chatml_tokenizer_folder
    )
    assert got.dropped == [(1, "too_long")]
    assert got.trained == [0, 2]
    assert lengths
    assert max(lengths) < 5_000_000  # of the proof


def test_a_template_that_raises(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """The error may quote the template, and never the row."""
    template = (
        "{%- for message in messages %}"
        "{%- if 'odd' in message.content %}"
        "{{- raise_exception('no odd rows, please') }}{%- endif %}"
        "{%- if 'zebra' in message.content %}"
        "{{- raise_exception('cannot say: ' + message.content) }}{%- endif %}"
        "{%- endfor %}" + CHATML
    )
    contents = ["odd", SECRET, SECRET_TEXT, f"x\n'{SECRET}' and more"]

    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, *(line(chat(content)) for content in contents)]))
    got = run(config_of([file], chatml_tokenizer_folder, chat_template=template), tmp_path)
    assert got.dropped == [(row, "template_error") for row in (1, 2, 3, 4)]
    assert "no odd rows, please" in got.text


def test_a_step_of_broken_rows_only(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Steps keep their rows: the second step trains nothing, and is still a step."""
    got = run_lines([GOOD] * 3 + [b"{", b"[", b"null"] + [GOOD], tmp_path, chatml_tokenizer_folder)
    assert [report.content.num_samples for report in got.reports] == [3, 0, 1]
    assert got.reports[1].content.num_trained_tokens == 0
    assert got.dropped == [(3, "malformed_json"), (4, "malformed_json"), (5, "not_an_object")]


def test_counts_of_each_source(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    first = tmp_path / "one.jsonl"
    second = tmp_path / "two.jsonl.gz"
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


def test_cut_rows_are_counted(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    first = tmp_path / "one.jsonl"
    second = tmp_path / "two.jsonl"
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


def test_too_long_can_be_an_error(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"{", GOOD, GOOD, line(chat(SECRET * 2_000))]))
    with pytest.raises(
        DataError, match=r"row 4 \(from 0\) of .*rows\.jsonl .*--too-long"
    ) as caught:
        run(config_of([file], chatml_tokenizer_folder, too_long="error"), tmp_path)
    assert SECRET not in str(caught.value)


def test_a_resume_keeps_counts_and_rejects(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    """Killed after any step, resumed from any checkpoint before it; two epochs, shuffled."""
    one = tmp_path / "one.jsonl"
    two = tmp_path / "two.jsonl"
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
        """Return the totals and the next row after each step, from `saved` on."""
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
