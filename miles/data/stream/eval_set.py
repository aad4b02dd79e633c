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

from miles.data.config import DataConfig, EncodeConfig
from miles.data.files.group_sizes import largest_read_rows
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.packing import shards
from miles.data.stream import pipeline, stages
from miles.data.stream.account import KEYS, Line, dropped, lines, not_used
from miles.data.stream.eval_rows import nothing_to_evaluate, require_usable
from miles.data.types import Chunk, MicroBatch, StepReport, UInt8
from miles.data.unused_names import add_count


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
    account: Sequence[Line] = ()
    """what is dropped and what is not used of the rows, in words"""

    @classmethod
    def open(cls, config: DataConfig, manifest: Manifest | None = None) -> EvalSet:
        """Read, encode and pack the whole set, with all loader CPUs.

        Call it before the training feed is opened: the feed's loaders keep their CPUs while they
        wait at its gate, so that an evaluation stream beside them would starve.

        Args:
            config: of `eval_config`. Ray must be initialised.
            manifest: of its sources, where their rows are counted already.

        Raises:
            DataError: there is nothing to evaluate, too many rows of the sources were rejected, or
                one for a reason that ends the run by itself.
            MilesError: a source or tokenizer cannot be used.
        """
        assert not config.order.shuffle, "an evaluation set is in file order"
        pipeline.require_loader_cpus(config)
        stages.encoder_of(config.encode)  # fails here, by name, rather than in a task
        manifest = manifest or build_manifest(config.sources)
        # Streamed windows: each row group is read about once.
        window_rows = max(config.order.window_rows, largest_read_rows(manifest))
        config = replace(config, order=replace(config.order, window_rows=window_rows))

        reports, references = _pack_all(manifest, config)
        rejects = list(chain.from_iterable(report.rows.rejects for report in reports))
        num_rows = sum(report.rows.num_read - report.rows.num_held_out for report in reports)
        num_trained_tokens = sum(report.content.num_trained_tokens for report in reports)
        require_usable(rejects, num_rows, config, manifest)
        if not num_trained_tokens:
            raise nothing_to_evaluate(rejects, num_rows, config, manifest)

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
            account=_account(reports, manifest, is_held_out=config.held_out == "only"),
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
        LostError: a chunk is lost, with its `EvalSet` or the node that held it.
    """
    for reference in references:
        chunk = _fetch(reference)
        (data_rank,) = chunk.data_ranks
        yield from shards.micro_batches(chunk, data_rank)
        del chunk  # or the next one would come beside it


def _account(reports: Sequence[StepReport], manifest: Manifest, *, is_held_out: bool) -> list[Line]:
    """Say what is dropped and what is not used of the rows to evaluate.

    Args:
        is_held_out: the rows are of training sources, whose files the training has told of.
    """
    reasons: Counter[str] = Counter()
    keys: dict[str, dict[str, int]] = {}
    for report in reports:
        reasons.update(reject.reason for reject in report.rows.rejects)
        for count in report.rows.unused_keys:
            name = manifest.source_names[count.source_id]
            add_count(keys.setdefault(name, {}), count.key, count.num_rows)

    ledger = {}
    for source in manifest.sources:
        entry = not_used(source, keys.get(source.name, {}))
        ledger[source.name] = {KEYS: entry[KEYS]} if is_held_out else entry
    return [*dropped(reasons), *lines(ledger)]


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
