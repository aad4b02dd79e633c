"""Rows that are held out of training: by what they say, and without moving any other row."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from miles.data.rows.normalize import normalize
from miles.data.stream import row_outcomes, stages
from miles.data.stream.eval_rows import RANK_ROWS, STEP_ROWS, eval_config
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.stream.row_outcomes import hash_share
from miles.data.types import Cursor, Step
from miles.errors import CheckpointError, ConfigError, DataError

NUM_ROWS = {"a": 230, "b": 70}
FRACTION = 0.3
ALL_ROWS = set(range(sum(NUM_ROWS.values())))
BROKEN = {row for row in ALL_ROWS if row % 7 == 3}
"""Cannot be read."""
LONG = {row for row in ALL_ROWS if row % 17 == 5} - BROKEN
"""Have too many tokens."""


def row_text(number: int) -> bytes:
    if number in BROKEN:
        return b'{"messages": '
    answer = "word " * 200 if number in LONG else f"answer {number}"
    return openai([("user", f"question {number}"), ("assistant", answer)])


def openai(turns: list[tuple[str, str]], **further: Any) -> bytes:
    return json.dumps(
        {"messages": [{"role": role, "content": text} for role, text in turns], **further}
    ).encode()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer_folder: Path) -> DataConfig:
    """300 rows in two files, some broken and some too long."""
    folder, first = tmp_path_factory.mktemp("rows"), 0
    for name, count in NUM_ROWS.items():
        lines = [row_text(number) for number in range(first, first + count)]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines))
        first += count
    return DataConfig(
        sources=tuple(
            SourceConfig(name, (str(folder / f"{name}.jsonl"),), RowFormat("messages"))
            for name in NUM_ROWS
        ),
        order=OrderConfig(batch_size=32, shuffle=True, seed=5, window_rows=96, num_epoch=2),
        encode=EncodeConfig(str(chatml_tokenizer_folder), max_sample_tokens=256),
        pack=PackConfig(dp_size=2, max_tokens_per_gpu=512),
        max_bad_fraction=1.0,
        held_out_fraction=FRACTION,
    )


def local(config: DataConfig, start_row: int = 0) -> list[Step]:
    return list(stages.local_steps(build_manifest(config.sources), config, start_row))


def rows_of(step: Step) -> list[int]:
    return sorted(
        int(row) for rank in step.micro_batches for one in rank for row in one.row_ids if row >= 0
    )


def rejects_of(step: Step) -> list[int]:
    return [reject.row_id for reject in step.report.rows.rejects]


def held_out_rows(config: DataConfig) -> set[int]:
    """From the rows by themselves."""
    return {row for row in ALL_ROWS - BROKEN if share(row_text(row)) < config.held_out_fraction}


# --- what is held out


SAID = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4")]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": 1, "a": 2}}}]


def share(payload: bytes, form: RowFormat | None = None) -> float:
    return hash_share(normalize(payload, form or RowFormat("messages")))


def test_share_is_equal_in_every_row_shape() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[role], "value": text, "weight": None} for role, text in SAID]
    place = share(openai(SAID))
    assert share(openai(SAID[1:], system="Be brief.", id=17, source="elsewhere")) == place
    assert share(json.dumps({"conversations": turns, "idx": 3}).encode()) == place
    turns[2]["weight"] = 1
    assert share(json.dumps({"conversations": turns}).encode()) == place
    parts = [
        {"role": role, "content": [{"type": "text", "text": text}], "name": "x"}
        for role, text in SAID
    ]
    assert share(json.dumps({"messages": json.dumps(parts)}).encode()) == place
    alpaca = {"instruction": "2+2?", "output": "4", "system": "Be brief."}
    assert share(json.dumps(alpaca).encode(), RowFormat("alpaca")) == place
    pair = {"prompt": "2+2?", "completion": "4", "system": "Be brief."}
    assert share(json.dumps(pair).encode(), RowFormat("prompt_completion")) == place


def test_share_counts_tools_not_key_order() -> None:
    place = share(openai(SAID, tools=TOOLS))
    turned = [{"function": {"parameters": {"a": 2, "b": 1}, "name": "add"}, "type": "function"}]
    assert share(openai(SAID, tools=json.dumps(turned))) == place
    assert place != share(openai(SAID))


def test_other_content_has_another_share() -> None:
    places = [
        share(openai(SAID)),
        share(openai([*SAID[:2], ("assistant", "5")])),
        share(openai([("user", "Be brief."), *SAID[1:]])),
        share(openai([("user", "2"), ("assistant", "+2?4")])),
        share(openai([("user", "2+"), ("assistant", "2?4")])),
        share(b'{"text": "2+2?4"}', RowFormat("text")),
        share(b'{"text": "2+2?5"}', RowFormat("text")),
    ]
    assert len(set(places)) == len(places)


def test_where_a_row_stands_never_changes() -> None:
    """Another hash would train, in a run that is gone on with, on what was held out of it."""
    assert share(openai(SAID, tools=TOOLS)).hex() == "0x1.3658182c89149p-1"
    assert (
        share('{"text": "Füße \\ud83d\\ude00"}'.encode(), RowFormat("text")).hex()
        == "0x1.61ab3865886fbp-8"
    )


def test_the_share_held_out_is_the_fraction() -> None:
    places = np.array(
        [share(openai([("user", f"q{n}"), ("assistant", "a")])) for n in range(20_000)]
    )
    assert 0 <= places.min() <= places.max() < 1
    for fraction in (0.01, 0.1, 0.5):
        assert abs((places < fraction).mean() - fraction) < 4 * (fraction / 20_000) ** 0.5


# --- the two streams


@pytest.mark.parametrize(
    "order", [{}, {"seed": 6, "batch_size": 50}, {"shuffle": False}, {"weights": (1.0, 1.0)}]
)
def test_every_row_is_used_or_reported_once(config: DataConfig, order: dict[str, Any]) -> None:
    """In any order. The last one repeats the smaller source and does not reach all of the larger."""
    expected = held_out_rows(config)
    assert 50 < len(expected) < 110
    config = replace(config, order=replace(config.order, **order))
    training = local(config)
    evaluation = local(eval_config(config, ()))
    trained = {row for step in training for row in rows_of(step)}
    dropped = {row for step in training for row in rejects_of(step)}
    evaluated = [row for step in evaluation for row in rows_of(step)]
    dropped_there = [row for step in evaluation for row in rejects_of(step)]

    assert len(evaluated + dropped_there) == len({*evaluated, *dropped_there}) == len(expected)
    assert {*evaluated, *dropped_there} == expected
    assert set(dropped_there) == LONG & expected, (
        "what cannot be read is the training stream's to report"
    )
    assert len(dropped_there) > 0
    assert not (trained | dropped) & expected
    if not config.order.weights:
        assert trained | dropped | expected == ALL_ROWS
        assert dropped == BROKEN | (LONG - expected), "rows that are held out are not encoded"


def test_copies_are_held_out_together(config: DataConfig, tmp_path: Path) -> None:
    readable = sorted(ALL_ROWS - BROKEN)
    rows = [json.loads(row_text(number)) for number in readable]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    copies = []
    for place in order:
        user, assistant = rows[place]["messages"]
        turns = [
            {"from": "human", "value": user["content"]},
            {"from": "gpt", "value": assistant["content"]},
        ]
        copies.append({"conversations": turns, "id": place})
    (tmp_path / "copies.json").write_text(json.dumps(copies))

    both = replace(
        config, sources=(SourceConfig("copies", (str(tmp_path / "copies.json"),)), *config.sources)
    )
    evaluation = local(eval_config(both, ()))

    found = {row for step in evaluation for row in [*rows_of(step), *rejects_of(step)]}
    expected = held_out_rows(config)
    assert found == {row + len(copies) for row in expected} | {
        row for row, place in enumerate(order) if readable[place] in expected
    }


def test_held_out_rows_move_no_other(config: DataConfig) -> None:
    expected = held_out_rows(config)
    whole = local(replace(config, held_out_fraction=0.0))
    shorter = local(config)

    assert len(whole) == len(shorter) == 20
    for before, after in zip(whole, shorter, strict=True):
        assert rows_of(after) == [row for row in rows_of(before) if row not in expected]
        assert rejects_of(after) == [row for row in rejects_of(before) if row not in expected]
        all_rows = [*rows_of(before), *rejects_of(before)]
        assert after.report.rows.num_held_out == sum(row in expected for row in all_rows)
        assert before.report.rows.held_out == (0, 0)
        assert before.report.position == after.report.position
        assert before.report.rows.read == after.report.rows.read
        for rank in after.micro_batches:
            assert len(rank) == len(after.micro_batches[0])


def test_resume_after_every_step(config: DataConfig) -> None:
    unbroken = local(config)
    for number, step in enumerate(unbroken):
        assert [one.fingerprint for one in local(config, step.next_row)] == [
            one.fingerprint for one in unbroken[number + 1 :]
        ]


def test_with_nothing_held_out_nothing_is_hashed(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        row_outcomes, "hash_share", lambda conversation: pytest.fail("hashed for nothing")
    )
    assert len(local(replace(config, held_out_fraction=0.0))) == 20


# --- the ledger and the cursor


def test_ledger_counts_held_out_rows(config: DataConfig, tmp_path: Path) -> None:
    manifest, expected = build_manifest(config.sources), held_out_rows(config)
    ledger = Ledger(manifest, str(tmp_path / "rejects.jsonl"), RejectLimits(1.0))
    for step in local(config):
        ledger.commit(step.index, step.report.rows)
    in_a = sum(row < NUM_ROWS["a"] for row in expected)
    totals = ledger.totals()
    assert [totals[name]["held_out"] for name in "ab"] == [2 * in_a, 2 * (len(expected) - in_a)]
    assert ledger.num_held_out == 2 * len(expected)
    for counts in totals.values():
        assert counts["read"] == sum(count for key, count in counts.items() if key != "read")
    rejected = (BROKEN | LONG) - expected
    assert ledger.num_rejected == 2 * len(rejected)
    listed = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {
        entry["row"] + (NUM_ROWS["a"] if entry["source"] == "b" else 0) for entry in listed
    } == rejected
    assert Ledger(manifest, None, RejectLimits(1.0), totals, next_step=20).totals() == totals


def test_streak_passes_over_held_out_rows(config: DataConfig, tmp_path: Path) -> None:
    """60 rows that are all too long: with some of them held out, all that are not come one after the other."""
    long_rows = [
        openai([("user", f"question {number}"), ("assistant", "word " * 200)])
        for number in range(60)
    ]
    (tmp_path / "long.jsonl").write_bytes(b"\n".join(long_rows))
    long_config = replace(
        config,
        sources=(SourceConfig("long", (str(tmp_path / "long.jsonl"),)),),
        order=OrderConfig(batch_size=2),
        held_out_fraction=0.5,
    )
    steps = local(long_config)
    num_left = 60 - sum(step.report.rows.num_held_out for step in steps)
    assert 15 < num_left < 45
    assert any(step.report.rows.num_held_out == 2 for step in steps), "one step is left empty"

    def commit_all(limit: int) -> None:
        ledger = Ledger(
            build_manifest(long_config.sources),
            None,
            RejectLimits(1.0, max_bad_rows_in_a_row=limit),
        )
        for step in steps:
            ledger.commit(step.index, step.report.rows)

    commit_all(num_left + 1)
    with pytest.raises(DataError, match=f"{num_left} rows in a row were dropped"):
        commit_all(num_left)


CURSOR = Cursor(0, 42, True, 96, 32, False, (), "m", "e", held_out_fraction=0.05)


def test_cursor_of_another_fraction_is_refused() -> None:
    again = Cursor.from_json(CURSOR.to_json(), "there")
    assert again == CURSOR
    again.require_same_data(replace(CURSOR, consumed_rows=7), "there")
    with pytest.raises(
        CheckpointError, match=r"--eval-fraction: the checkpoint has 0\.05, this run 0\.0"
    ):
        again.require_same_data(replace(CURSOR, held_out_fraction=0.0), "there")
    fields = json.loads(CURSOR.to_json())
    del fields["held_out_fraction"]
    old = Cursor.from_json(json.dumps(fields), "there")
    assert old.held_out_fraction == 0.0
    with pytest.raises(
        CheckpointError, match=r"--eval-fraction: the checkpoint has 0\.0, this run 0\.05"
    ):
        old.require_same_data(CURSOR, "there")


# --- the evaluation stream's settings


def test_own_sources_are_evaluated_in_full(
    config: DataConfig,
) -> None:
    weighted = replace(
        config, order=replace(config.order, weights=(3.0, 1.0), drop_last=True, num_epoch=4)
    )
    own = eval_config(weighted, (SourceConfig("own", ("x.jsonl",)),))
    assert [(source.name, source.is_evaluation) for source in own.sources] == [("own", True)]
    assert (own.held_out_fraction, own.held_out) == (0.0, "leave_out")

    held_out = eval_config(weighted, ())
    assert held_out.sources == config.sources
    assert (held_out.held_out_fraction, held_out.held_out) == (FRACTION, "only")

    for settings in (own, held_out):
        order = settings.order
        assert (order.shuffle, order.num_epoch, order.weights, order.drop_last) == (
            False,
            1,
            (),
            False,
        )
        same = (settings.encode, settings.pack, settings.stream)
        assert same == (config.encode, config.pack, config.stream)

    assert own.order.batch_size == STEP_ROWS
    assert held_out.order.batch_size * FRACTION == pytest.approx(STEP_ROWS, rel=0.01), (
        "as many are left to pack"
    )

    many_ranks = eval_config(replace(config, pack=PackConfig(64, 512)), own.sources)
    assert many_ranks.order.batch_size == 64 * RANK_ROWS
    few = eval_config(replace(config, held_out_fraction=1e-6), ())
    assert few.order.batch_size == 32_768, "a loader holds no more than that"
    with pytest.raises(ConfigError, match="--eval-prompt-data PATH, or an --eval-fraction above 0"):
        eval_config(replace(config, held_out_fraction=0.0), ())


# --- pairs of tokens


def test_causal_pairs_are_counted_sample_by_sample(config: DataConfig) -> None:
    """A token attends to itself and to all before it in its sample: 1 + 2 + … + L."""
    for dp_size, max_tokens in ((1, 4096), (3, 256)):
        for step in local(replace(config, pack=PackConfig(dp_size, max_tokens))):
            by_hand = 0
            for batch in (batch for rank in step.micro_batches for batch in rank):
                for number, row in enumerate(batch.row_ids):
                    length = int(batch.cu_seqlens[number + 1] - batch.cu_seqlens[number])
                    by_hand += sum(range(1, length + 1)) if row >= 0 else 0
            assert step.report.content.num_causal_pairs == by_hand > 0
            assert isinstance(step.report.content.num_causal_pairs, int)
