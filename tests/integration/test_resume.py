"""Resume anywhere: after every step, with other ranks, twice. It reads what is needed, and refuses
other settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow.parquet as pq
import pytest

from miles.data.config import DataConfig, OrderConfig, PackConfig, SourceConfig, StreamConfig
from miles.data.cursor_differences import FLAGS, INPUTS
from miles.data.files.manifest import build_manifest
from miles.data.stream import stages
from miles.data.stream.feed import Feed
from miles.data.types import Cursor, Step
from miles.errors import CheckpointError
from tests.support.row_files import random_conversations, write_conversations
from tests.support.streams import (
    UNREAD_KEY,
    Seen,
    add_unread_keys,
    config_of,
    demo_settings,
    follow,
    local,
    opened,
    seen,
    seen_of,
    trained_rows,
    with_layout,
)

DP_SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    settings = demo_settings(tmp_path_factory.mktemp("resume"))
    add_unread_keys(settings)
    return config_of(settings)


ORDERS = {
    "shuffled": {},
    "whole steps only": {"drop_last": True},
    "one window": {"window_rows": 10_000, "batch_size": 100},
    "a window a step": {"window_rows": 1, "batch_size": 90},
    "in file order": {"shuffle": False},
}


@pytest.mark.parametrize("order", ORDERS)
def test_resume_after_every_step_and_twice(config: DataConfig, order: str) -> None:
    config = replace(config, order=replace(config.order, **ORDERS[order]))
    manifest = build_manifest(config.sources)
    unbroken = [seen(step) for step in local(config)]
    sizes = itertools.cycle(DP_SIZES)

    def resumed(start_row: int, num_steps: int | None = None) -> list[Step]:
        stream = stages.local_steps(manifest, with_layout(config, next(sizes)), start_row)
        return list(itertools.islice(stream, num_steps))

    assert len(unbroken) >= 14
    cursors = [step.next_row for step in local(config)]
    for number, start_row in enumerate(cursors):
        once = resumed(start_row)
        assert [seen(step) for step in once] == unbroken[number + 1 :]
        if once:
            before_the_second = once[: 1 + number % 3]
            twice = resumed(before_the_second[-1].next_row)
            assert [seen(step) for step in twice] == unbroken[number + 1 + len(before_the_second) :]


def test_feed_resumes_at_other_layouts(config: DataConfig, tmp_path: Path) -> None:
    """Stop after 3, 8 and 14 steps of 22: in the first window, the second, the second epoch."""
    unbroken = local(config)
    taken: list[Seen] = []
    cursor: Cursor | None = None

    for dp_size, num_steps in ((2, 3), (1, 5), (4, 6), (2, None)):
        layout = with_layout(config, dp_size, max_tokens_per_gpu=256 * dp_size)
        with opened(layout, str(tmp_path), cursor) as feed:
            assert feed.first_step == len(taken)
            for report, digest in follow(feed, layout, num_steps):
                taken.append(seen_of(report, digest))
            text = feed.cursor().to_json()
        cursor = Cursor.from_json(text, "there")
        assert cursor.to_json() == text
        assert cursor.consumed_rows == unbroken[len(taken) - 1].next_row
        assert cursor.tokens_seen == sum(step.num_trained_tokens for step in unbroken[: len(taken)])

    assert taken == [seen(step) for step in unbroken]
    assert cursor is not None

    read_rows = {name: counts["read"] for name, counts in cursor.ledger_totals.items()}
    assert read_rows == {
        source.name: 2 * source.num_rows for source in build_manifest(config.sources).sources
    }

    num_with_key = len(range(0, cursor.ledger_totals["chat"]["read"] // 2, 5))
    assert cursor.unused_keys == {"chat": {UNREAD_KEY: 2 * num_with_key}}

    num_rejected = sum(
        counts["read"] - counts["trained"] for counts in cursor.ledger_totals.values()
    )
    assert num_rejected == 2 * 4
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 4


def test_nothing_follows_the_end(config: DataConfig) -> None:
    assert local(config, local(config)[-1].next_row) == []


# --- what is read


FOOTER_BYTES = 64 << 10
"""pyarrow reads so much of a file's end for its footer, and with it some row groups' bytes where
they are small.
"""


class Counted(fsspec.AbstractFileSystem):
    """Remote files, as it were, and which bytes of them were read."""

    protocol = "counted"
    files: ClassVar[dict[str, bytes]] = {}
    spans: ClassVar[list[tuple[int, int]]] = []

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name not in self.files:
            raise FileNotFoundError(path)
        return {"name": name, "type": "file", "size": len(self.files[name]), "etag": "1"}

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return CountedFile(self, path, mode, cache_type="none")


class CountedFile(fsspec.spec.AbstractBufferedFile):
    """A file of `Counted`, without any read-ahead."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.spans.append((start, end))
        return self.fs.files[self.path][start:end]


@pytest.fixture
def counted(tmp_path: Path) -> tuple[str, list[tuple[int, int]]]:
    """4,000 rows in groups of 50, on a filesystem that counts; the URL, and where each group's
    bytes lie.
    """
    local_file = tmp_path / "rows.parquet"
    write_conversations(local_file, random_conversations(4_000), 50)
    metadata = pq.read_metadata(local_file)
    spans = []

    for group in range(metadata.num_row_groups):
        columns = [
            metadata.row_group(group).column(number) for number in range(metadata.num_columns)
        ]
        begins = [
            min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in columns
        ]
        ends = [begin + c.total_compressed_size for begin, c in zip(begins, columns, strict=True)]
        spans.append((min(begins), max(ends)))

    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.files["rows.parquet"] = local_file.read_bytes()
    return "counted://rows.parquet", spans


@pytest.mark.parametrize("share", [0.9, 0.99])
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in file order"])
def test_resume_reads_only_needed_row_groups(
    config: DataConfig, counted: tuple[str, list[tuple[int, int]]], shuffle: bool, share: float
) -> None:
    url, groups = counted
    config = replace(
        config,
        sources=(SourceConfig("rows", (url,)),),
        order=OrderConfig(batch_size=10, shuffle=shuffle, seed=1, window_rows=1_000),
        max_bad_fraction=1.0,
    )
    manifest = build_manifest(config.sources)
    assert len(groups) == 80

    Counted.spans.clear()
    steps = list(stages.local_steps(manifest, config, int(4_000 * share)))
    size = len(Counted.files["rows.parquet"])
    spans = [
        (start, stop) for start, stop in Counted.spans if stop < size or stop - start > FOOTER_BYTES
    ]
    touched = {
        number
        for number, (begin, end) in enumerate(groups)
        if any(start < end and begin < stop for start, stop in spans)
    }
    rows = [row for step in steps for row in trained_rows(step)]
    rows += [reject.row_id for step in steps for reject in step.report.rows.rejects]
    assert len(rows) == 4_000 - int(4_000 * share)
    assert touched == {row // 50 for row in rows}
    assert len(touched) <= 20, "a window has no more"


# --- what is refused


def another(value: Any) -> Any:
    """Some other value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"other {value}"
    assert isinstance(value, tuple), value
    return (*value, 1)


FIXED = [
    field.name
    for field in dataclasses.fields(Cursor)
    if field.name not in (*Cursor.COUNTS, "version")
]


@pytest.fixture(scope="module")
def cursor(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Cursor:
    """After two steps of a run."""
    with opened(config, str(tmp_path_factory.mktemp("cursor"))) as feed:
        list(follow(feed, config, 2))
        return feed.cursor()


def named(field: str) -> str:
    """Return how a refusal names a field of the cursor: by the flag that gives it."""
    return FLAGS.get(field) or INPUTS[field].partition(":")[0]


@pytest.mark.parametrize("name", FIXED)
def test_cursor_of_another_setting_is_refused(
    config: DataConfig, cursor: Cursor, tmp_path: Path, name: str
) -> None:
    """Every field that is no count, so that a new one cannot be forgotten."""
    old, today = another(getattr(cursor, name)), getattr(cursor, name)
    with pytest.raises(CheckpointError) as raised:
        open_at(config, replace(cursor, **{name: old}), tmp_path)
    first, *others = str(raised.value).splitlines()
    assert first.startswith("there cannot be resumed")
    assert len(others) == 1, "named alone"
    assert others[0].strip().startswith(named(name))
    if name == "batch_size":
        assert f"the checkpoint has {old}, this run {today}" in others[0]


def test_cursor_of_another_version_is_refused(cursor: Cursor) -> None:
    with pytest.raises(
        CheckpointError, match=rf"there: data cursor of version {cursor.version + 1}"
    ):
        Cursor.from_json(replace(cursor, version=cursor.version + 1).to_json(), "there")


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "seed": ("order", {"seed": 4}),
    "shuffle": ("order", {"shuffle": False}),
    "window_rows": ("order", {"window_rows": 320}),
    "batch_size": ("order", {"batch_size": 32}),
    "drop_last": ("order", {"drop_last": True}),
    "mixture": ("order", {"weights": (2.0, 1.0)}),
    "encoder_fingerprint": ("encode", {"max_sample_tokens": 255}),
    "empty_answer": ("encode", {"empty_answer": "train"}),
    "manifest_fingerprint": ("", {}),
    "held_out_fraction": ("", {"held_out_fraction": 0.05}),
}
"""Field of the cursor -> a change of the run's settings that it holds against."""


@pytest.mark.parametrize("name", FIXED)
def test_changed_setting_is_refused(
    config: DataConfig, cursor: Cursor, tmp_path: Path, name: str
) -> None:
    part, change = CHANGES[name]
    if name == "manifest_fingerprint":
        changed = replace(config, sources=config.sources[::-1])
    else:
        changed = replace(
            config, **({part: replace(getattr(config, part), **change)} if part else change)
        )
    with pytest.raises(CheckpointError, match=re.escape(named(name))):
        open_at(changed, cursor, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"turns": "last"},
        {"too_long": "truncate_end"},
        {"special_text": "reject"},
        {"empty_think": "train"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_changed_encoding_is_refused(
    config: DataConfig, cursor: Cursor, tmp_path: Path, change: dict[str, Any]
) -> None:
    changed = replace(config, encode=replace(config.encode, **change))
    with pytest.raises(
        CheckpointError, match="another tokenizer or chat template than the checkpoint's"
    ):
        open_at(changed, cursor, tmp_path)


def test_other_layout_is_not_refused(config: DataConfig, cursor: Cursor, tmp_path: Path) -> None:
    changed = replace(
        config,
        order=replace(config.order, num_epoch=5, window_rows=config.order.window_rows - 1),
        pack=PackConfig(1, 4096),
        stream=StreamConfig(
            loader_cpus=2, prefetch_steps=1, target_block_bytes=1 << 12, max_retries=0
        ),
    )
    open_at(changed, cursor, tmp_path).close()


def open_at(config: DataConfig, cursor: Cursor, run_dir: Path) -> Feed:
    return Feed.open(config, cursor=cursor, cursor_path="there", num_ranks=1, run_dir=str(run_dir))
