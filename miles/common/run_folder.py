"""The names of the files in a run's folder, and in a folder that `miles prepare` wrote.

The folder of a run is `--output-dir`, or `--save`. Each name stands here once: the writer and
every reader import it. A folder is an fsspec URL, so that a path is `storage.join(folder,
run_folder.METRICS)`.
"""

from __future__ import annotations

# The run itself.
CONFIG = "config.json"
"""The resolved configuration."""
CERTIFICATE = "certificate.json"
"""The proven properties of the tokenizer and its chat template."""

# The course of the run.
METRICS = "metrics.jsonl"
"""One line a step."""
RUN_LOG = "train.log"
"""The reports of the driver, with times."""
ATTEMPTS = "starts.jsonl"
"""Each start of the trainers, and how it ended."""
SKIPPED_STEPS = "skipped_steps.jsonl"
"""The steps that took no optimizer step because a number was not finite, with their rows."""

# The data.
FIRST_BATCH = "first_batch.json"
"""The samples of the first step, with their masks."""
LEDGER = "ledger.json"
"""The account of each source's rows: trained, held out, or dropped and why."""
REJECTS = "rejects.jsonl"
"""Each row that could not be used, and the reason. Also in a prepared folder."""

# For a person to look at.
EVAL_SAMPLES = "eval_samples.jsonl"
"""The answers of each evaluation."""
REPORT = "report.html"
LOSS_CHART = "loss.png"

# Boards.
TENSORBOARD = "tensorboard"
"""A folder."""
WANDB_ID = "wandb_id.txt"

# A prepared folder, beside its `part-*.parquet` and `REJECTS`.
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
"""Counts of rows and tokens, the ledger, and the encoder's fingerprint."""
