"""The end of a run: the ledger and the export that follow its last step."""

from __future__ import annotations

import json

from miles.common import run_folder, storage
from miles.common.patient_file import PatientFile
from miles.data.stream import account
from miles.data.stream.feed import Feed
from miles.train.config import TrainConfig
from miles.train.driver.export import export_if_missing
from miles.train.driver.finished import LAST_STEP, finished_text
from miles.train.driver.opening import open_metrics
from miles.train.driver.run import AttemptData, Run, RunSummary
from miles.train.driver.run_log import RunLog
from miles.train.types import StartPoint


def write_ledger(config: TrainConfig, feed: Feed, run_log: RunLog) -> None:
    """Write the account of all rows into the run folder, and judge those that were dropped.

    What was dropped or not used is said in short.

    If it cannot be written, the run says so, and the same command does it later.

    Raises:
        DataError: too many rows were dropped.
    """
    path = storage.join(config.run_dir, run_folder.LEDGER)
    file = PatientFile(path, report=run_log.report)
    ledger = feed.ledger_summary()
    file.replace([json.dumps(ledger, indent=1)])
    file.close()
    feed.finish()
    for line in account.sentences(ledger):
        run_log.report(line)


def conclude_finished_run(run: Run, start: StartPoint, data: AttemptData) -> RunSummary:
    """Do what follows the last step, in case an earlier attempt was interrupted there.

    Returns:
        the summary of an attempt without steps.
    """
    feed = data.feed
    run.run_log.report(finished_text(feed.first_step, data.schedule.num_steps, start.url))

    if data.state.unwritten_metrics:
        open_metrics(run, data).close()
    write_ledger(run.config, feed, run.run_log)
    export_if_missing(run.config, start.url, start.checkpoint.iteration, run.run_log)
    run.attempt_log.end(LAST_STEP, feed.first_step)
    return RunSummary.of(
        [],
        tokens_seen=feed.cursor().tokens_seen,
        checkpoint=start.url,
        next_step=feed.first_step,
        is_finished=True,
    )
