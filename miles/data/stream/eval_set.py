"""Rows to evaluate on: encoded once, before training begins, and kept packed in the object store.

    the stream, in file order, one epoch -> blocks of steps -> a chunk for each data rank
                                                            -> every evaluation reads them again

These are the rows of sources of their own, or those rows of the training sources that a hash of
their content holds out (`row_outcomes.hash_share`). Nothing here moves the training cursor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from miles.data.config import (
    DEFAULT_WINDOW_ROWS,
    DataConfig,
    EncodeConfig,
    OrderConfig,
    SourceConfig,
)
from miles.data.files.group_sizes import largest_read_rows
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.packing import shards
from miles.data.stream import pipeline, stages
from miles.data.stream.reject_limits import FATAL_ADVICE, RejectLimits
from miles.data.types import Chunk, MicroBatch, Reject, StepReport, UInt8
from miles.errors import ConfigError, DataError

STEP_ROWS = 1_024
"""Rows that are packed together, at least.

A step has as many micro-batches on every rank, and what its samples do not fill stays empty.
Samples of 550 tokens over 8 ranks of 8,192 tokens fill 97 % where 1,024 rows are packed together,
and 60 % where 128 are.
"""
RANK_ROWS = 128
"""Rows that are packed together for each data rank, at least."""
WINDOW_ROWS = 8_192
"""Rows that one loader's task reads.

Few enough that a set of some ten thousand rows keeps several loaders busy, and many against a row
group, because a row group that lies across two windows is read twice.
"""


def eval_config(data: DataConfig, sources: tuple[SourceConfig, ...]) -> DataConfig:
    """Return the configuration of the evaluation stream: as for training, in file order, once.

    Args:
        data: of the training stream.
        sources: of the evaluation alone (`--eval-prompt-data`), with all their rows. Without any,
            the held-out rows of the training sources are used.

    Raises:
        ConfigError: there are neither sources nor held-out rows.
    """
    step_rows = max(STEP_ROWS, RANK_ROWS * data.pack.dp_size)
    if sources:
        order = OrderConfig(batch_size=step_rows, window_rows=WINDOW_ROWS, num_epoch=1)
        return replace(
            data, sources=sources, order=order, held_out_fraction=0.0, held_out="leave_out"
        )

    if data.held_out_fraction <= 0:
        raise ConfigError(
            "nothing to evaluate on: give --eval-prompt-data PATH, or an --eval-fraction above 0"
        )
    # As many rows of the input as leave `step_rows` held-out ones to pack, but no more than a
    # loader holds for training.
    input_rows = min(int(step_rows / data.held_out_fraction), max(step_rows, DEFAULT_WINDOW_ROWS))
    order = OrderConfig(batch_size=input_rows, window_rows=WINDOW_ROWS, num_epoch=1)
    return replace(data, order=order, held_out="only")


@dataclass(frozen=True)
class EvalPrompt:
    """A sample cut before its last answer."""

    source: str
    file: str
    """fsspec URL"""
    row: int
    """number in the file, from 0"""
    prompt_ids: list[int]
    """[tokens]: all before the answer, at least one"""
    answer_ids: list[int]
    """[tokens]: the last run of trained tokens, terminator included"""


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Evaluation rows, encoded once and kept packed in the object store (spilled if large).

    This process owns the objects: they live as long as this object does.
    """

    source_names: tuple[str, ...]
    num_rows: int
    """rows to evaluate, used or rejected"""
    num_rejected: int
    num_samples: int
    num_tokens: int
    num_trained_tokens: int
    """positions whose label is trained"""
    source_trained_tokens: tuple[int, ...]
    references: list[list[ray.ObjectRef]]
    """[chunks][data ranks], each to a `Chunk`: the steps of a block in which something is
    evaluated. Each step has as many micro-batches on every rank."""
    manifest: Manifest
    encode: EncodeConfig

    @classmethod
    def open(cls, config: DataConfig) -> EvalSet:
        """Read, encode and pack the whole set, with all loader CPUs.

        Call it before the training feed is opened: the feed's loaders keep their CPUs while they
        wait at its gate, so that an evaluation stream beside them would starve.

        Args:
            config: of `eval_config`. Ray must be initialised.

        Raises:
            DataError: there is nothing to evaluate, too many rows of the sources were rejected, or
                one for a reason that ends the run by itself.
            MilesError: a source or tokenizer cannot be used.
        """
        assert not config.order.shuffle, "an evaluation set is in file order"
        pipeline.require_loader_cpus(config)
        stages.encoder_of(config.encode)  # fails here, by name, rather than in a task
        manifest = build_manifest(config.sources)
        # Streamed windows: each row group is read about once.
        window_rows = max(config.order.window_rows, largest_read_rows(manifest))
        config = replace(config, order=replace(config.order, window_rows=window_rows))

        reports, references = _pack_all(manifest, config)
        rejects = list(chain.from_iterable(report.rows.rejects for report in reports))
        num_rows = sum(report.rows.num_read - report.rows.num_held_out for report in reports)
        num_trained_tokens = sum(report.content.num_trained_tokens for report in reports)
        _require_usable(rejects, num_rows, config, manifest)
        if not num_trained_tokens:
            raise _nothing_to_evaluate(rejects, num_rows, config, manifest)

        by_source = [report.content.source_trained_tokens for report in reports]
        return cls(
            source_names=manifest.source_names,
            num_rows=num_rows,
            num_rejected=len(rejects),
            num_samples=sum(report.content.num_samples for report in reports),
            num_tokens=sum(report.content.num_tokens for report in reports),
            num_trained_tokens=num_trained_tokens,
            source_trained_tokens=tuple(map(sum, zip(*by_source, strict=True))),
            references=references,
            manifest=manifest,
            encode=config.encode,
        )

    def prompts(self, count: int) -> list[EvalPrompt]:
        """Return prompts of the first `count` samples that have something before their last answer.

        They are in the order of the files, whatever the number of ranks; fewer where there are no
        more.
        """
        prompts: list[EvalPrompt] = []
        for references in self.references:
            if len(prompts) >= count:
                break

            samples: list[shards.Segment] = []
            for reference in references:
                samples += shards.segments(_fetch(reference))

            for sample in sorted(samples, key=lambda sample: sample.row_id):
                begin, end = _last_answer(sample.loss_mask)
                if begin > 0:
                    source, file, row = self.manifest.locate(sample.row_id)
                    ids = sample.input_ids.tolist()
                    prompts.append(EvalPrompt(source, file, row, ids[:begin], ids[begin:end]))
        return prompts[:count]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of [tokens], control tokens written out."""
        tokenizer = stages.encoder_of(self.encode).tokenizer
        return tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @property
    def terminator_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return stages.encoder_of(self.encode).certificate.terminator_ids


def micro_batches(references: Sequence[ray.ObjectRef]) -> Iterator[tuple[MicroBatch, ...]]:
    """Yield a data rank's micro-batches, step by step. One chunk is held at a time.

    Args:
        references: the rank's share of every chunk: `[chunk[dp_rank] for chunk in
            EvalSet.references]`. Within a list they stay references; Ray puts the object itself in
            place of a reference that is an argument by itself.

    Raises:
        ClusterError: a chunk is lost, with its `EvalSet` or the node that held it.
    """
    for reference in references:
        yield from shards.micro_batches(_fetch(reference))


def _pack_all(
    manifest: Manifest, config: DataConfig
) -> tuple[list[StepReport], list[list[ray.ObjectRef]]]:
    """Run the stream to its end, and keep the steps in which something is evaluated.

    Returns:
        The reports of all steps, and [chunks][data ranks] references.
    """
    reports: list[StepReport] = []
    references = []
    for block in pipeline.blocks(pipeline.build(manifest, config)):
        block_reports = shards.reports(block)
        reports += block_reports
        is_kept = [report.content.num_trained_tokens > 0 for report in block_reports]
        if any(is_kept):
            kept = list(compress(block_reports, is_kept))
            chunks = shards.chunks(block.filter(pa.array(is_kept)), kept)
            references.append([ray.put(chunk) for chunk in chunks])
    return reports, references


def _fetch(reference: Any) -> Chunk:
    """Return a chunk from the object store."""
    try:
        chunk: Chunk = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise pipeline.cause_of(error) from error
    return chunk


def _last_answer(loss_mask: UInt8) -> tuple[int, int]:
    """Return where the last run of trained tokens begins and ends; (0, 0) if there is none."""
    trained = np.flatnonzero(loss_mask)
    if not len(trained):
        return 0, 0
    end = int(trained[-1]) + 1
    begin = int(np.flatnonzero(loss_mask[:end] == 0).max(initial=-1)) + 1
    return begin, end


def _require_usable(
    rejects: Sequence[Reject], num_rows: int, config: DataConfig, manifest: Manifest
) -> None:
    """Judge the rejects as the ledger does in training.

    The share is judged only for sources of their own. Held-out rows are like the other rows of
    their files, which the training stream judges, and so few that one reject might be too large a
    share.

    Raises:
        DataError: too many rows were rejected, or one for a fatal reason.
    """
    limits = RejectLimits.of(config)
    if fatal := limits.fatal(rejects):
        raise DataError(
            f"of the rows to evaluate {_reasons(fatal, manifest)}. {FATAL_ADVICE[fatal[0].reason]}"
        )
    if config.held_out != "only" and limits.is_share_exceeded(len(rejects), num_rows):
        rows = f"{num_rows} rows to evaluate"
        raise limits.share_error(len(rejects), rows, reasons=_reasons(rejects, manifest))


def _nothing_to_evaluate(
    rejects: Sequence[Reject], num_rows: int, config: DataConfig, manifest: Manifest
) -> DataError:
    """Return the error of a set in which nothing is trained."""
    dropped = f": {_reasons(rejects, manifest)}" if rejects else ""
    if config.held_out == "only":
        return DataError(
            f"nothing to evaluate: --eval-fraction {config.held_out_fraction} holds out {num_rows} "
            f"of {manifest.num_rows} rows, and none of these can be used{dropped}. Raise it, or "
            "give --eval-prompt-data"
        )
    paths = ", ".join(chain.from_iterable(source.paths for source in config.sources))
    return DataError(
        f"nothing to evaluate: none of the {num_rows} rows of --eval-prompt-data {paths} can be "
        f"used{dropped}"
    )


def _reasons(rejects: Sequence[Reject], manifest: Manifest) -> str:
    """Return why rows were rejected, with the first row of each reason.

    2 too_long (first: row 7 (from 0) of x.jsonl, 9000 tokens, at most 8192), 1 no_messages (…)
    """
    parts = []
    counts = Counter(reject.reason for reject in rejects)

    for reason, number in counts.most_common():
        first = next(reject for reject in rejects if reject.reason == reason)
        _, file, row = manifest.locate(first.row_id)
        parts.append(f"{number} {reason} (first: row {row} (from 0) of {file}, {first.detail})")
    return ", ".join(parts)
