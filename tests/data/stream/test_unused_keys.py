"""Keys of messages that nothing reads, counted through the stages: each row in its own stream."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.stream import stages
from miles.data.stream.eval_rows import eval_config
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.stream.survey import take_sample
from miles.data.types import Step, StepRows
from miles.data.unused_names import OTHERS
from tests.support.conversations import assistant, trained_text, user
from tests.support.row_cases import require_served, take

LONG = "a key whose name is a sentence of more than forty characters"


def row(number: int) -> dict[str, Any]:
    """Return a row of which some have keys that ChatML reads, and some that it does not."""
    answer = assistant(f"answer {number}")
    if number % 3 == 0:
        answer |= {"mood": "calm", "weight": 1}
    if number % 10 == 1:
        answer |= {"mood": None, "note": ""}
    if number % 10 == 2:
        answer |= {LONG: 1}
    if number % 15 == 0:
        answer["content"] = "word " * 300  # too long, and read all the same
    if number % 7 == 3:
        answer = {"role": "npc", "content": "?", "mood": "calm"}
    return {"id": number, "messages": [user(f"question {number}") | {"mood": "glad"}, answer]}


def has_mood(number: int) -> bool:
    return number % 7 != 3  # the other rows have a role that is not known


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer_folder: Path) -> DataConfig:
    """Two sources of 60 and 40 rows; only the first has rows with a mood on every question."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps(row(number)) for number in range(60)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    plain = [json.dumps({"messages": [user(str(n)), assistant("b")]}) for n in range(40)]
    (folder / "b.jsonl").write_text("\n".join(plain))
    return DataConfig(
        sources=tuple(SourceConfig(name, (str(folder / f"{name}.jsonl"),)) for name in "ab"),
        order=OrderConfig(batch_size=8, shuffle=True, seed=5, window_rows=24, num_epoch=2),
        encode=EncodeConfig(str(chatml_tokenizer_folder), max_sample_tokens=256),
        pack=PackConfig(dp_size=2, max_tokens_per_gpu=512),
        max_bad_fraction=1.0,
    )


def local(config: DataConfig, start_row: int = 0) -> list[Step]:
    return list(stages.local_steps(build_manifest(config.sources), config, start_row))


def counted(config: DataConfig, rows: Iterable[StepRows]) -> tuple[Ledger, dict[str, int]]:
    """Enter steps into a ledger; return it, and the keys of source "a"."""
    ledger = Ledger(build_manifest(config.sources), None, RejectLimits(1.0))
    for number, of_step in enumerate(rows):
        ledger.commit(number, of_step)
        for counts in ledger.totals().values():
            num_outcomes = sum(n for key, n in counts.items() if key not in ("read", "truncated"))
            assert counts["read"] == num_outcomes
    return ledger, ledger.unused_keys().get("a", {})


EXPECTED = {"mood": sum(map(has_mood, range(60))), LONG[:39] + "…": 5}
"""Of one epoch. Rows 2, 12, 22, 32, 42 have the other key, and row 52, whose role is not known."""


def test_keys_are_counted_as_rows_are_read(config: DataConfig) -> None:
    """Two epochs; a null, a weight and a blank say nothing; a row that is too long counts."""
    ledger, keys = counted(config, (step.report.rows for step in local(config)))
    assert keys == {key: 2 * number for key, number in EXPECTED.items()}
    assert list(ledger.unused_keys()) == ["a"]
    assert ledger.totals()["a"]["too_long"] > 0
    assert ledger.summary()["a"]["columns_not_used"] == ["id"]


def test_the_sample_and_prepare_count_the_same(config: DataConfig) -> None:
    manifest = build_manifest(config.sources)
    assert take_sample(manifest, config).unused_keys == {"a": EXPECTED, "b": {}}

    once = replace(config, order=OrderConfig(batch_size=8))
    plan = stages.make_plan(manifest, once)
    encoder = stages.encoder_of(config.encode)
    rows: list[StepRows] = []
    for ref in plan.windows(0):
        for raw in stages.read_window(manifest, plan, ref, 0):
            prepared = stages.prepare_steps(raw, manifest, encoder).to_pylist()
            rows += [StepRows.from_columns(columns) for columns in prepared]
    assert counted(once, rows)[1] == EXPECTED


def test_each_row_counts_in_its_own_stream(config: DataConfig) -> None:
    """Held-out rows count where they are evaluated, and nowhere else."""
    held_out = replace(config, held_out_fraction=0.4)
    evaluated = eval_config(held_out, ())
    training = counted(config, (step.report.rows for step in local(held_out)))[1]
    evaluation = counted(config, (step.report.rows for step in local(evaluated)))[1]
    assert 0 < evaluation["mood"] < EXPECTED["mood"]
    twice = Counter(evaluation) + Counter(evaluation)
    assert Counter(training) + twice == {key: 2 * number for key, number in EXPECTED.items()}


def test_resume_after_every_step_counts_the_same(config: DataConfig) -> None:
    steps = local(config)
    for number, step in enumerate(steps):
        following = local(config, step.next_row)
        assert [one.report.rows for one in following] == [
            one.report.rows for one in steps[number + 1 :]
        ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_under_each_of_its_names_is_used(config: DataConfig, key: str) -> None:
    """As transformers gives it to a template under all of them."""
    encoder = stages.encoder_of(config.encode)
    for conversation in take(f"reasoning-fields/{key}.jsonl").conversations:
        messages = [dict(message) for message in conversation.messages]
        encoded = require_served(encoder, conversation, messages)
        assert messages[-1][key] in "".join(trained_text(encoder.tokenizer, encoded))
        assert encoder.unused_keys(conversation) == ()


def test_a_thought_within_the_answer_is_used(config: DataConfig) -> None:
    encoder = stages.encoder_of(config.encode)
    for conversation in take("think-close-only/rows.jsonl").conversations:
        require_served(encoder, conversation, [dict(one) for one in conversation.messages])
        assert encoder.unused_keys(conversation) == ()


def test_a_row_of_ten_thousand_keys_is_counted_in_few(tmp_path: Path, config: DataConfig) -> None:
    wide = assistant("a", **{f"key {number}": 1 for number in range(10_000)})
    (tmp_path / "wide.jsonl").write_text(json.dumps({"messages": [user("?"), wide]}))
    source = SourceConfig("a", (str(tmp_path / "wide.jsonl"),))
    one = replace(config, sources=(source,), order=OrderConfig(batch_size=1))
    keys = counted(one, (step.report.rows for step in local(one)))[1]
    assert len(keys) == 101
    assert keys[OTHERS] == 1
