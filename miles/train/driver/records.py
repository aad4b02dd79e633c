"""The files of a run's folder that only tell of it, looked at before a run goes on in the folder.

A disk that lost a block, a copy that was interrupted, another version: a line that cannot be read
ends no run. The file keeps its other lines; the whole of it is copied to `NAME.broken`. Everything
that reads these files later finds lines that it knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.console import Console

from miles.common import own_files, run_folder, storage
from miles.common.own_files import Form
from miles.train.driver.run_log import RunLog

_WANDB_ID = re.compile(rb"[\w.-]{1,128}")
_ROW: Sequence[Form] = (("source", "file", "row"),)
_STEP: Sequence[Form] = (("step",),)

RECORDS: Mapping[str, Sequence[Form]] = {
    run_folder.METRICS: _STEP,
    run_folder.ATTEMPTS: (("start", "reason"), ("end", "how"), ("not_begun",)),
    run_folder.SKIPPED_STEPS: _STEP,
    run_folder.EVAL_SAMPLES: _STEP,
    run_folder.REJECTS: _ROW,
}
"""File of JSON lines -> the keys of its lines; a line has one of the forms."""


def open_run_log(run_dir: str, console: Console) -> RunLog:
    """Mend the records of a run's folder; return its run log, in which that is said.

    Args:
        run_dir: the run folder (fsspec URL).
    """
    mended = mend_records(run_dir)
    run_log = RunLog(run_dir, console)
    for sentence in mended:
        run_log.report(sentence)
    return run_log


def mend_records(run_dir: str) -> list[str]:
    """Have the records of a run's folder hold what can be read; return a sentence for each change.

    Raises:
        SourceError: a file cannot be read at all.
        WriteError: a file cannot be written.
    """
    sentences = [own_files.mend_text(storage.join(run_dir, run_folder.RUN_LOG))]
    for name, forms in RECORDS.items():
        sentences.append(own_files.mend(storage.join(run_dir, name), forms))
    sentences.append(_mend_wandb_id(storage.join(run_dir, run_folder.WANDB_ID)))
    return [sentence for sentence in sentences if sentence]


def _mend_wandb_id(url: str) -> str:
    """Set aside a file that holds no id, so that a new one is drawn; return that in a sentence."""
    if not storage.exists(url) or _WANDB_ID.fullmatch(storage.read_bytes(url).strip()):
        return ""
    aside = own_files.copy_aside(url)
    storage.remove(url)
    return (
        f"{url}: not the id of a run at Weights & Biases; its curves go on under a new one. The "
        f"whole file is in {aside}"
    )
