"""Counts reconcile at every step, nothing counts twice, and every reject is named once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest

from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
    StreamConfig,
)
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.reasons import REASONS
from miles.data.stream.ledger import Ledger
from miles.data.stream.reject_limits import RejectLimits
from miles.data.types import Cursor, KeyCount, Reject, StepRows
from miles.data.unused_names import MAX_NAMES, OTHERS
from miles.errors import CheckpointError, DataError

NUM_ROWS = {"a": 600, "b": 900}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    for name, num_rows in NUM_ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text('{"x": 1}\n' * num_rows)
    text = RowFormat("text")
    return build_manifest(
        [SourceConfig(name, (str(tmp_path / f"{name}.jsonl"),), text) for name in NUM_ROWS]
    )


class Entry(NamedTuple):
    """The entry of a step."""

    index: int
    rows: StepRows


def entry(
    index: int,
    read: tuple[int, ...],
    *rejects: Reject,
    truncated: tuple[int, ...] = (0, 0),
    held_out: tuple[int, ...] = (0, 0),
    keys: tuple[KeyCount, ...] = (),
) -> Entry:
    return Entry(index, StepRows(read, truncated, held_out, rejects, keys))


STEPS = [
    entry(
        0,
        (10, 5),
        Reject(3, 0, "no_messages", "turn 1"),
        Reject(602, 1, "too_long", ""),
        keys=(KeyCount(1, "mood", 5), KeyCount(1, "a", 1)),
    ),
    entry(1, (0, 15), truncated=(0, 2), keys=(KeyCount(1, "b", 15),)),
    entry(2, (5, 10), Reject(700, 1, "too_long", "9000 tokens"), keys=(KeyCount(1, "a", 4),)),
    entry(3, (10, 5), Reject(3, 0, "no_messages", "turn 1")),  # the next epoch, the same row again
]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_counts_reconcile_at_every_commit(manifest: Manifest, tmp_path: Path) -> None:
    ledger = Ledger(manifest, str(tmp_path / "run/rejects.jsonl"), RejectLimits(1.0))
    read = 0

    for step in STEPS:
        ledger.commit(*step)
        read += step.rows.num_read
        totals = ledger.totals()
        for counts in totals.values():
            assert counts["read"] == sum(
                n for key, n in counts.items() if key not in ("read", "truncated")
            )
        assert sum(counts["read"] for counts in totals.values()) == read == ledger.num_read

    assert totals == {
        "a": {"read": 25, "trained": 23, "no_messages": 2},
        "b": {"read": 35, "trained": 33, "truncated": 2, "too_long": 2},
    }
    assert ledger.num_rejected == 4
    assert lines(tmp_path / "run/rejects.jsonl") == ledger.rejects
    assert ledger.rejects == [
        {
            "source": "a",
            "file": str(tmp_path / "a.jsonl"),
            "row": 3,
            "reason": "no_messages",
            "detail": "turn 1",
        },
        {
            "source": "b",
            "file": str(tmp_path / "b.jsonl"),
            "row": 2,
            "reason": "too_long",
            "detail": "",
        },
        {
            "source": "b",
            "file": str(tmp_path / "b.jsonl"),
            "row": 100,
            "reason": "too_long",
            "detail": "9000 tokens",
        },
    ]


def test_a_step_counts_once(manifest: Manifest, tmp_path: Path) -> None:
    ledger = Ledger(manifest, str(tmp_path / "rejects.jsonl"), RejectLimits(1.0))
    for step in STEPS[:3]:
        ledger.commit(*step)
        before = ledger.totals()
        for again in STEPS[: step.index + 1]:
            ledger.commit(*again)
        assert ledger.totals() == before
    assert len(lines(tmp_path / "rejects.jsonl")) == 3


@pytest.mark.parametrize("remote", [False, True])
def test_resume_at_every_step(manifest: Manifest, tmp_path: Path, remote: bool) -> None:
    """Killed at any step, resumed from any checkpoint before it: the same totals and file."""
    folder = "memory://ledger" if remote else str(tmp_path)

    def content(name: str) -> str:
        with fsspec.open(f"{folder}/{name}", "r") as stream:
            return stream.read()

    whole = Ledger(manifest, f"{folder}/whole.jsonl", RejectLimits(1.0))
    for step in STEPS:
        whole.commit(*step)
    for saved in range(len(STEPS) + 1):
        for killed in range(saved, len(STEPS) + 1):
            name = f"{saved}-{killed}.jsonl"
            first = Ledger(manifest, f"{folder}/{name}", RejectLimits(1.0))
            kept = ""
            for step in [*STEPS[:killed], None]:
                if step is None or step.index == saved:
                    kept = kept or json.dumps([first.totals(), first.unused_keys()], sort_keys=True)
                if step is not None:
                    first.commit(*step)
            totals, keys = json.loads(kept)
            second = Ledger(
                manifest,
                f"{folder}/{name}",
                RejectLimits(1.0),
                totals,
                next_step=saved,
                unused_keys=keys,
            )
            for step in STEPS[saved:]:
                second.commit(*step)
            assert second.totals() == whole.totals()
            assert second.unused_keys() == whole.unused_keys()
            assert json.dumps(second.summary()) == json.dumps(whole.summary())
            assert content(name) == content("whole.jsonl")
    if remote:
        fsspec.filesystem("memory").rm("/ledger", recursive=True)


def test_keys_that_nothing_reads_are_counted_by_source(manifest: Manifest) -> None:
    ledger = Ledger(manifest, None, RejectLimits(1.0))
    for step in STEPS:
        ledger.commit(*step)
        ledger.commit(*step)
    assert ledger.unused_keys() == {"b": {"mood": 5, "a": 5, "b": 15}}
    assert list(ledger.summary()["b"]["keys_not_used"].items()) == [
        ("b", 15),
        ("a", 5),
        ("mood", 5),
    ]
    assert ledger.summary()["a"]["keys_not_used"] == {}


def test_keys_of_a_source_are_bounded(manifest: Manifest) -> None:
    """Resumed after any step, the same ones are kept."""
    steps = []
    for index in range(6):
        keys = [KeyCount(0, f"key {number}", 1) for number in range(30 * index, 30 * index + 45)]
        steps.append(entry(index, (1, 0), keys=tuple(keys)))
    whole = Ledger(manifest, None, RejectLimits(1.0))
    for step in steps:
        whole.commit(*step)
    counts = whole.unused_keys()["a"]
    assert len(counts) == MAX_NAMES + 1
    assert sum(counts.values()) == 6 * 45
    assert list(whole.summary()["a"]["keys_not_used"])[-1] == OTHERS

    ledger = Ledger(manifest, None, RejectLimits(1.0))
    for number, step in enumerate(steps):
        ledger.commit(*step)
        kept = json.loads(json.dumps([ledger.totals(), ledger.unused_keys()], sort_keys=True))
        ledger = Ledger(manifest, None, RejectLimits(1.0), kept[0], number + 1, unused_keys=kept[1])
    assert ledger.unused_keys() == whole.unused_keys()


def test_a_cursor_from_before_keys_were_counted_is_read() -> None:
    new = Cursor(1, 2, True, 3, 4, False, (), "m", "e", unused_keys={"a": {"mood": 5}})
    fields = json.loads(new.to_json())
    del fields["unused_keys"]
    old = Cursor.from_json(json.dumps(fields), "there")
    assert old == replace(new, unused_keys={})
    assert Cursor.from_json(new.to_json(), "there") == new
    old.require_same_data(new, "there")


@pytest.mark.parametrize("keys", [{"elsewhere": {"x": 1}}, {"a": 3}])
def test_unused_keys_that_cannot_be(manifest: Manifest, keys: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="unused keys of the checkpoint"):
        Ledger(manifest, None, RejectLimits(1.0), unused_keys=keys)


def test_half_a_line_is_dropped(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    ledger = Ledger(manifest, str(path), RejectLimits(1.0))
    ledger.commit(*STEPS[0])
    whole = path.read_text()
    path.write_text(whole + '{"source": "a", "fi')
    Ledger(manifest, str(path), RejectLimits(1.0), ledger.totals(), next_step=1)
    assert path.read_text() == whole
    Ledger(manifest, str(path), RejectLimits(1.0))
    assert path.read_text() == ""


def test_without_a_file(manifest: Manifest) -> None:
    ledger = Ledger(manifest, None, RejectLimits(1.0))
    ledger.commit(*STEPS[0])
    assert [reject["row"] for reject in ledger.rejects] == [3, 2]


def test_file_of_two_sources_is_named_twice(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"x": 1}\n' * 5)
    path, text = str(tmp_path / "rows.jsonl"), RowFormat("text")
    ledger = Ledger(
        build_manifest([SourceConfig(name, (path,), text) for name in "ab"]),
        None,
        RejectLimits(1.0),
    )
    ledger.commit(
        *entry(0, (5, 5), Reject(2, 0, "no_messages", ""), Reject(7, 1, "no_messages", ""))
    )
    assert [(reject["source"], reject["row"]) for reject in ledger.rejects] == [("a", 2), ("b", 2)]


def test_too_many_rejects_end_the_run(manifest: Manifest, tmp_path: Path) -> None:
    path = str(tmp_path / "rejects.jsonl")
    rejects = tuple(Reject(row, 0, "too_long", "9000 tokens") for row in range(11))
    ledger = Ledger(manifest, path, RejectLimits(0.01))
    ledger.commit(*entry(0, (500, 0), *rejects))  # 2.2 %, but too early to say
    with pytest.raises(
        DataError, match=r"11 of the 500 rows read were dropped.*--max-bad-fraction"
    ):
        ledger.judge()
    with pytest.raises(DataError, match="11 of the 1,000 rows") as caught:
        ledger.commit(*entry(1, (0, 500)))
    remedy = (
        f" All: too_long (first: row 0 (from 0) of {tmp_path / 'a.jsonl'}, 9000 tokens). "
        f"What to do: {REASONS['too_long'].remedy}."
    )
    account = """
  in all: 1,000 rows read, 989 trained, 11 too_long
  a: 500 rows read, 489 trained, 11 too_long
  b: 500 rows read, 500 trained
  each dropped row is named in """
    assert str(caught.value).endswith(
        f"allows.{remedy} Mend or remove them, or raise the share.{account}{path}"
    )
    assert ledger.num_read == 1000
    exactly = Ledger(manifest, path, RejectLimits(0.01))
    exactly.commit(*entry(0, (500, 500), *rejects[:10]))
    exactly.judge()


def test_held_out_rows_are_not_judged(manifest: Manifest) -> None:
    """10 of 600 are bad, and 500 more are held out: as if there were 600."""
    rejects = tuple(Reject(row, 0, "too_long", "", row) for row in range(10))
    ledger = Ledger(manifest, None, RejectLimits(0.01))
    ledger.commit(
        *entry(0, (600, 500), *rejects, held_out=(0, 500))
    )  # fewer are left than are judged at once
    assert (ledger.num_read, ledger.num_held_out, ledger.num_rejected) == (1100, 500, 10)
    assert ledger.totals()["b"] == {"read": 500, "trained": 0, "held_out": 500}
    assert ledger.summary()["b"]["counts"]["held_out"] == 500
    assert "held_out" not in ledger.totals()["a"], "only where there are any"
    with pytest.raises(
        DataError, match="10 of the 600 rows read and not held out were dropped"
    ) as caught:
        ledger.judge()
    assert "in all: 1,100 rows read, 590 trained, 500 held out, 10 too_long" in str(caught.value)
    assert "b: 500 rows read, 0 trained, 500 held out" in str(caught.value)
    resumed = Ledger(manifest, None, RejectLimits(0.02), ledger.totals(), next_step=1)
    resumed.commit(*entry(1, (0, 400), held_out=(0, 100)))
    assert resumed.totals()["b"] == {"read": 900, "trained": 300, "held_out": 600}
    with pytest.raises(CheckpointError, match="do not reconcile"):
        Ledger(
            manifest,
            None,
            RejectLimits(1.0),
            {"a": {"read": 5, "trained": 3, "held_out": 1}},
            next_step=1,
        )


def bad(position: int, row_id: int, reason: str = "too_long") -> Reject:
    return Reject(row_id, 0 if row_id < NUM_ROWS["a"] else 1, reason, "", position)


@pytest.mark.parametrize(
    ("limit", "step", "run"),
    [
        (1, 0, (2, "row 9 (from 0) of {a}", "row 1 (from 0) of {b}")),
        (2, 0, (2, "row 9 (from 0) of {a}", "row 1 (from 0) of {b}")),
        (3, 1, (4, "row 9 (from 0) of {a}", "row 3 (from 0) of {a}")),
        (4, 1, (4, "row 9 (from 0) of {a}", "row 3 (from 0) of {a}")),
        (5, None, None),
    ],
)
def test_long_streak_ends_the_run(
    manifest: Manifest,
    tmp_path: Path,
    limit: int,
    step: int | None,
    run: tuple[int, str, str] | None,
) -> None:
    """In the order of consumption, over the borders of steps; a step without any breaks the run."""
    steps = [
        entry(0, (3, 2), bad(4, 601), bad(1, 7, "no_messages"), bad(3, 9)),  # rejects in no order
        entry(1, (5, 0), bad(0, 20), bad(1, 3), bad(3, 5), bad(4, 6)),
        entry(2, (5, 0)),
        entry(3, (3, 0), bad(0, 30), bad(1, 31), bad(2, 32)),
        entry(4, (1, 1), bad(0, 33)),
        entry(5, (2, 0), bad(0, 34)),
    ]
    ledger = Ledger(
        manifest, str(tmp_path / "rejects.jsonl"), RejectLimits(1.0, max_bad_rows_in_a_row=limit)
    )
    failed = None
    for one in steps:
        try:
            ledger.commit(*one)
        except DataError as error:
            failed = one.index
            message = str(error)
            break
    assert failed == step
    if run is None:
        return
    num_rows, first, last = run
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in NUM_ROWS}
    first, last = first.format(**paths), last.format(**paths)
    assert message.startswith(
        f"{num_rows} rows in a row were dropped, from {first} (source 'a') to {last} (source"
    )
    assert f"--max-bad-rows-in-a-row ends the run at {limit}" in message
    assert f"in all: {5 * (failed + 1):,} rows read, " in message
    assert len(lines(tmp_path / "rejects.jsonl")) == sum(
        len(one.rows.rejects) for one in steps[: failed + 1]
    )


def test_resumed_run_begins_a_new_streak(manifest: Manifest) -> None:
    steps = [entry(0, (2, 0), bad(0, 0), bad(1, 1)), entry(1, (2, 0), bad(0, 2))]
    whole = Ledger(manifest, None, RejectLimits(1.0, max_bad_rows_in_a_row=3))
    whole.commit(*steps[0])
    limits = RejectLimits(1.0, max_bad_rows_in_a_row=3)
    resumed = Ledger(manifest, None, limits, whole.totals(), next_step=1)
    resumed.commit(*steps[1])
    with pytest.raises(DataError, match="3 rows in a row"):
        whole.commit(*steps[1])


def test_fatal_reason_ends_the_run(manifest: Manifest, tmp_path: Path) -> None:
    config = DataConfig(
        sources=(SourceConfig("a", ("a.jsonl",)),),
        order=OrderConfig(batch_size=1),
        encode=EncodeConfig("tokenizer"),
        pack=PackConfig(),
        stream=StreamConfig(),
    )
    assert RejectLimits.of(config).fatal_reasons == frozenset()
    strict = replace(config, encode=EncodeConfig("tokenizer", too_long="error"))
    limits = replace(RejectLimits.of(strict), max_bad_fraction=1.0)
    ledger = Ledger(manifest, str(tmp_path / "rejects.jsonl"), limits)
    ledger.commit(*entry(0, (5, 5), Reject(3, 0, "no_messages", "")))
    long = Reject(602, 1, "too_long", "9000 tokens, at most 8192", position=1)
    with pytest.raises(DataError) as caught:
        ledger.commit(*entry(1, (1, 1), long))
    assert (
        f"row 2 (from 0) of {tmp_path / 'b.jsonl'} (source 'b'): too_long, 9000 tokens, at most 8192"
        in str(caught.value)
    )
    assert "--too-long error" in str(caught.value)
    assert "b: 6 rows read, 5 trained, 1 too_long" in str(caught.value)
    assert [reject["row"] for reject in lines(tmp_path / "rejects.jsonl")] == [3, 2]


def test_summary_has_the_row_shape(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "2+2?", "a": "4"}\n' * 10)
    columns = {"prompt": "q", "completion": "a"}
    form = RowFormat(columns=columns)
    manifest = build_manifest([SourceConfig("sums", (str(tmp_path / "a.jsonl"),), form)])
    ledger = Ledger(manifest, None, RejectLimits(1.0))
    ledger.commit(*entry(0, (10,), truncated=(4,), held_out=(0,)))
    summary = json.loads(json.dumps(ledger.summary()))
    assert list(summary) == ["sums"]
    assert summary["sums"]["row_shape"] == "prompt_completion"
    assert summary["sums"]["columns"] == columns
    assert (
        summary["sums"]["counts"]
        == ledger.totals()["sums"]
        == {"read": 10, "trained": 10, "truncated": 4}
    )
    assert "sums: 10 rows read, 10 trained (4 truncated)" in ledger._account()


def test_summary_of_a_resumed_run_is_the_same_text(manifest: Manifest) -> None:
    """A cursor's JSON has its keys in alphabetical order."""
    steps = [entry(0, (3, 0), bad(0, 0)), entry(1, (3, 0), Reject(4, 0, "bad_message", ""))]
    whole = Ledger(manifest, None, RejectLimits(1.0))
    for step in steps:
        whole.commit(*step)
    before = Ledger(manifest, None, RejectLimits(1.0))
    before.commit(*steps[0])
    totals = json.loads(json.dumps(before.totals(), sort_keys=True))
    resumed = Ledger(manifest, None, RejectLimits(1.0), totals, next_step=1)
    resumed.commit(*steps[1])
    assert json.dumps(resumed.summary()) == json.dumps(whole.summary())


@pytest.mark.parametrize(
    "totals",
    [
        {"elsewhere": {"read": 1, "trained": 1}},
        {"a": {"read": 2, "trained": 1}},
        {"a": {"read": 2}},
        {"a": {"read": 3, "trained": 2, "truncated": 1}},
    ],
)
def test_totals_that_cannot_be(manifest: Manifest, totals: dict[str, dict[str, int]]) -> None:
    with pytest.raises(CheckpointError, match="ledger totals"):
        Ledger(manifest, None, RejectLimits(1.0), totals, next_step=1)


def test_a_run_in_which_nothing_was_trained_does_not_end_well(manifest: Manifest) -> None:
    """However large a share may be dropped."""
    ledger = Ledger(manifest, None, RejectLimits(1.0))
    ledger.require_trained()
    ledger.commit(*entry(0, (2, 0), bad(0, 4), bad(1, 7)))
    ledger.judge()
    with pytest.raises(
        DataError,
        match=r"none of the 2 rows read can be used: nothing was trained.* All: too_long \(first: row 4",
    ):
        ledger.require_trained()
    ledger.commit(*entry(1, (2, 0), bad(0, 8)))
    ledger.require_trained()
