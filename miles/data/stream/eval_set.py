"""Rows to evaluate on: encoded once, before training begins, and kept packed in Ray's object store.

    the ordinary stream -> a block of steps -> a chunk for each data rank -> object store -> every evaluation reads it
    (file order, one epoch)                     [references: chunks x data ranks]

What is evaluated is either sources of its own, or the rows of the training sources that a hash of what they say holds
out of training (`row_outcomes.hash_share`). Nothing here moves the training cursor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from miles.data.stream.ledger import FATAL, fatal_reasons
from miles.data.types import Chunk, MicroBatch, Reject, StepReport, UInt8
from miles.errors import ConfigError, DataError

STEP_ROWS = 1_024
"""Rows that are packed together, at least. A step has as many micro-batches on every rank, and what its samples do not
fill stays empty: of samples of 550 tokens over 8 ranks of 8,192 tokens, 1,024 together fill 97 %, 128 only 60 %."""
RANK_ROWS = 128
"""Rows that are packed together for each data rank, at least."""
WINDOW_ROWS = 8_192
"""Rows that one loader's task reads: few enough that a set of some ten thousand keeps several loaders busy, and many
against a row group, since the one that lies across two windows is read twice."""


def eval_config(data: DataConfig, sources: tuple[SourceConfig, ...]) -> DataConfig:
    """What the evaluation stream needs to know: encoded, packed and loaded as for training, in file order, once.

    Args:
        data: of the training stream.
        sources: all of their rows (`--eval-prompt-data`); none: the rows of the training sources that are held out.

    Raises:
        ConfigError: neither sources nor held-out rows.
    """
    step_rows = max(STEP_ROWS, RANK_ROWS * data.pack.dp_size)
    if sources:
        return replace(
            data,
            sources=sources,
            order=_order(step_rows),
            held_out_fraction=0.0,
            held_out="leave_out",
        )
    if data.held_out_fraction <= 0:
        raise ConfigError(
            "nothing to evaluate on: give --eval-prompt-data PATH, or an --eval-fraction above 0"
        )
    # So many rows of the input that as many are left to pack; a loader holds no more of them than for training.
    step_rows = min(int(step_rows / data.held_out_fraction), max(step_rows, DEFAULT_WINDOW_ROWS))
    return replace(data, order=_order(step_rows), held_out="only")


def _order(step_rows: int) -> OrderConfig:
    return OrderConfig(batch_size=step_rows, window_rows=WINDOW_ROWS)


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
    """[chunks][data ranks], each to a `Chunk`: the steps of a block with anything to evaluate. Each step has as many
    micro-batches on every rank."""
    manifest: Manifest
    encode: EncodeConfig

    @classmethod
    def open(cls, config: DataConfig) -> EvalSet:
        """Reads, encodes and packs the whole set, with all loader CPUs.

        To be called before the training feed is opened: the feed's loaders keep their CPUs while they wait at its gate
        for leave to load a window, so that an evaluation stream beside them would starve.

        Args:
            config: of `eval_config`. Ray must be initialised.

        Raises:
            DataError: there is nothing to evaluate, or of sources of their own more rows than `max_bad_fraction` of
                them were rejected, or one for a reason that ends the run by itself.
            MilesError: a source or tokenizer that cannot be used.
        """
        assert not config.order.shuffle, "an evaluation set is in file order"
        pipeline.require_loader_cpus(config)
        stages.encoder_of(config.encode)  # fails here, by name, rather than in a task
        manifest = build_manifest(config.sources)
        window_rows = max(
            config.order.window_rows, largest_read_rows(manifest)
        )  # streamed, each group about once
        config = replace(config, order=replace(config.order, window_rows=window_rows))
        reports: list[StepReport] = []
        references = []
        for block in pipeline.blocks(pipeline.build(manifest, config)):
            made = shards.reports(block)
            reports += made
            kept = [report for report in made if report.content.num_trained_tokens]
            if kept:
                block = block.filter(
                    pa.array([report.content.num_trained_tokens > 0 for report in made])
                )
                references.append([ray.put(chunk) for chunk in shards.chunks(block, kept)])
        rejects = [reject for report in reports for reject in report.rows.rejects]
        num_rows = sum(report.rows.num_read - report.rows.num_held_out for report in reports)
        _judge(rejects, num_rows, config, manifest)
        num_trained_tokens = sum(report.content.num_trained_tokens for report in reports)
        if not num_trained_tokens:
            raise DataError(_nothing(rejects, num_rows, config, manifest))
        return cls(
            source_names=manifest.source_names,
            num_rows=num_rows,
            num_rejected=len(rejects),
            num_samples=sum(report.content.num_samples for report in reports),
            num_tokens=sum(report.content.num_tokens for report in reports),
            num_trained_tokens=num_trained_tokens,
            source_trained_tokens=tuple(
                map(
                    sum,
                    zip(*(report.content.source_trained_tokens for report in reports), strict=True),
                )
            ),
            references=references,
            manifest=manifest,
            encode=config.encode,
        )

    def prompts(self, count: int) -> list[EvalPrompt]:
        """The first `count` samples, in the order of the files, that have something before their last run of trained
        tokens; fewer where there are no more. The same whatever the number of ranks."""
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
        """The text of [tokens], control tokens written out."""
        tokenizer = stages.encoder_of(self.encode).tokenizer
        return tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @property
    def terminator_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return stages.encoder_of(self.encode).certificate.terminator_ids


def micro_batches(references: Sequence[ray.ObjectRef]) -> Iterator[tuple[MicroBatch, ...]]:
    """A data rank's micro-batches of one step after the other; one chunk is held at a time.

    Args:
        references: the rank's of every chunk, `[of_chunk[dp_rank] for of_chunk in EvalSet.references]`. Ray puts the
            object itself in place of a reference that is an argument of its own; within a list they stay references.

    Raises:
        ClusterError: a chunk is lost, with its `EvalSet` or the node that held it.
    """
    for reference in references:
        yield from shards.micro_batches(_fetch(reference))


def _fetch(reference: Any) -> Chunk:
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


def _judge(
    rejects: Sequence[Reject], num_rows: int, config: DataConfig, manifest: Manifest
) -> None:
    """As the ledger judges the training stream. The share is judged only of sources of their own: held-out rows are as
    the other rows of their files, which the training stream judges, and so few that one might be too large a share."""
    fatal = [reject for reject in rejects if reject.reason in fatal_reasons(config.encode)]
    if fatal:
        raise DataError(
            f"of the rows to evaluate {_told(fatal, manifest)}. {FATAL[fatal[0].reason]}"
        )
    if config.held_out != "only" and len(rejects) > config.max_bad_fraction * num_rows:
        raise DataError(
            f"{len(rejects)} of the {num_rows} rows to evaluate were dropped, more than the share "
            f"{config.max_bad_fraction} that --max-bad-fraction allows: {_told(rejects, manifest)}. Mend or remove "
            "them, or raise the share"
        )


def _nothing(
    rejects: Sequence[Reject], num_rows: int, config: DataConfig, manifest: Manifest
) -> str:
    dropped = f": {_told(rejects, manifest)}" if rejects else ""
    if config.held_out == "only":
        return (
            f"nothing to evaluate: --eval-fraction {config.held_out_fraction} holds out {num_rows} of "
            f"{manifest.num_rows} rows, of which none can be used{dropped}. Raise it, or give --eval-prompt-data"
        )
    paths = ", ".join(path for source in config.sources for path in source.paths)
    return f"nothing to evaluate: none of the {num_rows} rows of --eval-prompt-data {paths} can be used{dropped}"


def _told(rejects: Sequence[Reject], manifest: Manifest) -> str:
    """`2 too_long (first: row 7 (from 0) of x.jsonl, 9000 tokens, at most 8192), 1 no_messages (…)`"""
    told = []
    for reason, number in Counter(reject.reason for reject in rejects).most_common():
        first = next(reject for reject in rejects if reject.reason == reason)
        _, file, row = manifest.locate(first.row_id)
        told.append(f"{number} {reason} (first: row {row} (from 0) of {file}, {first.detail})")
    return ", ".join(told)
