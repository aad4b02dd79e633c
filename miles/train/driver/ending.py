"""The end of a run: the ledger and the export that follow its last step."""

from __future__ import annotations

import json

from miles.common import run_folder, storage
from miles.data.stream.feed import Feed
from miles.train.config import TrainConfig
from miles.train.driver.export import export_if_missing
from miles.train.driver.run import AttemptData, Run, RunSummary
from miles.train.types import StartPoint


def write_ledger(config: TrainConfig, feed: Feed) -> None:
    """Write the account of all rows into the run folder, and close that of the rejects."""
    path = storage.join(config.run_dir, run_folder.LEDGER)
    storage.write_text(path, json.dumps(feed.ledger_summary(), indent=1))
    feed.finish()


def conclude_finished_run(run: Run, start: StartPoint, data: AttemptData) -> RunSummary:
    """Do what follows the last step, in case an earlier attempt was interrupted there.

    Returns:
        the summary of an attempt without steps.
    """
    feed = data.feed
    run.run_log.report(
        f"this run is finished: {feed.first_step} of {data.schedule.num_steps} steps are in "
        f"{start.url}"
    )

    write_ledger(run.config, feed)
    export_if_missing(run.config, start.url, start.checkpoint.iteration, run.run_log)
    return RunSummary.of(
        [],
        tokens_seen=feed.cursor().tokens_seen,
        checkpoint=start.url,
        next_step=feed.first_step,
        is_finished=True,
    )
