"""A weighted mixture over the feed: shares at every step, passes of each source, counts in the
metrics, resume.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.architecture.config import ModelShape
from miles.data.config import DataConfig
from miles.data.files.manifest import build_manifest
from miles.data.stream.feed import Feed
from miles.data.types import Cursor
from miles.errors import CheckpointError
from miles.train.driver.metrics import RunConstants, RunTotals, step_metrics
from miles.train.types import StepResult
from tests.support.streams import (
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

WEIGHTS = (1.0, 3.0)
"""chat, which has more rows, and code, which comes round more often"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    settings = demo_settings(
        tmp_path_factory.mktemp("mixture"), weights=WEIGHTS, batch_size=50, window_rows=200
    )
    return config_of(settings)


def metrics_of(report: Any, epochs: tuple[float, ...]) -> dict[str, Any]:
    shape = ModelShape("qwen3", 1, 8, 8, 1, 1, 8, 16, 64, 1e4, 1e-6, True, True, False)
    result = StepResult((1.0, 2.0), report.content.source_trained_tokens, 1.0, 1e-3, 0.1)
    constants = RunConstants(("chat", "code"), shape, world_size=1, device_name=None)
    totals = RunTotals(epochs, tokens_seen=0, num_skipped_steps=0)
    return step_metrics(constants, report, result, totals, step_seconds=1.0)


def test_sources_have_their_shares_at_every_step(config: DataConfig, tmp_path: Path) -> None:
    manifest = build_manifest(config.sources)
    sizes = np.array([source.num_rows for source in manifest.sources])
    shares = np.array(WEIGHTS) / sum(WEIGHTS)

    with opened(config, str(tmp_path)) as feed:
        rows, cursors = np.zeros(2, int), []
        for report, _ in follow(feed, config):
            rows += report.rows.read
            consumed = rows.sum()
            assert np.abs(rows - shares * consumed).max() <= 1, (
                "a row; a batch of them was promised"
            )
            assert feed.source_epochs() == pytest.approx(rows / sizes)
            metrics = metrics_of(report, feed.source_epochs())
            for number, name in enumerate(("chat", "code")):
                assert metrics[f"data/num_rows/{name}"] == report.rows.read[number]
                assert (
                    metrics[f"data/trained_tokens/{name}"]
                    == report.content.source_trained_tokens[number]
                )
                assert metrics[f"sft/epoch/{name}"] == pytest.approx(
                    rows[number] / sizes[number], abs=1e-6
                )
            cursors.append(feed.cursor())
        summary = feed.ledger_summary()

    assert cursors[-1].consumed_rows == consumed == config.order.num_epoch * manifest.num_rows
    assert rows[1] / sizes[1] > 3 > 1 > rows[0] / sizes[0] / 2, "one is repeated, the other cut"
    assert [entry["epochs"] for entry in summary.values()] == pytest.approx(
        list(rows / sizes), abs=1e-6
    )
    assert [entry["counts"]["read"] for entry in summary.values()] == list(rows)


def test_rows_come_again_after_all_others(config: DataConfig) -> None:
    manifest = build_manifest(config.sources)
    in_order = [row for step in local(config) for row in trained_rows(step)]
    for source, first in zip(manifest.sources, (0, manifest.sources[0].num_rows), strict=True):
        own = [row for row in in_order if first <= row < first + source.num_rows]
        counts = np.bincount(np.array(own) - first, minlength=source.num_rows)
        assert counts.max() - counts[counts > 0].min() <= 1


def test_mixture_resumes_at_another_layout(config: DataConfig, tmp_path: Path) -> None:
    unbroken = [seen(step) for step in local(config)]
    with opened(config, str(tmp_path)) as feed:
        for _ in follow(feed, config, num_steps=7):
            pass
        cursor = Cursor.from_json(feed.cursor().to_json(), "there")

    assert cursor.mixture == (1, 3)

    layout = with_layout(config, 4)
    with opened(layout, str(tmp_path), cursor) as feed:
        assert [seen_of(report, digest) for report, digest in follow(feed, layout)] == unbroken[7:]

    for number, step in enumerate(local(config)):
        following = local(with_layout(config, 1 + number % 4), step.next_row)
        assert [seen(one) for one in following] == unbroken[number + 1 :]


def test_cursor_refuses_other_weights(config: DataConfig, tmp_path: Path) -> None:
    with opened(config, str(tmp_path)) as feed:
        cursor = feed.cursor()
    other = replace(config, order=replace(config.order, weights=(1.0, 2.0)))
    with pytest.raises(
        CheckpointError, match="--prompt-data-weights: the checkpoint has 1 3, this run 1 2"
    ):
        Feed.open(other, cursor=cursor, cursor_path="there", num_ranks=1, run_dir=str(tmp_path))
    same = replace(config, order=replace(config.order, weights=(0.25, 0.75)))
    with opened(same, str(tmp_path), cursor):
        pass
