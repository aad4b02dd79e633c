"""The steps of a data set as a notebook sees them: with a length, a card, and an iterator.

    steps = ds.steps(batch_size=128, max_tokens_per_gpu=9216)
    len(steps)                129: rows are dealt to steps before any is dropped, see docs/order.md
    for step in steps: …      from the beginning each time
    steps.preview(step)       its samples, coloured by their mask

A small data set is read and packed by this process, a large one by loaders on Ray: the steps are
the same.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from miles.common.counts import counted
from miles.common.facts import Facts
from miles.common.progress import progress
from miles.data.config import DataConfig
from miles.data.files.manifest import Manifest
from miles.data.notebook.every_row import OBJECT_STORE_BYTES
from miles.data.notebook.preview import Preview, as_text
from miles.data.notebook.row import Row
from miles.data.order.plan import Plan
from miles.data.packing.shards import unpack
from miles.data.stream import stages
from miles.data.types import DUMMY_ROW_ID, Encoded, MicroBatch, Step
from miles.errors import ConfigError

_BOX_CSS = (
    "font:14px/1.5 system-ui,sans-serif;display:inline-block;box-sizing:border-box;"
    "min-width:min(34em,100%);max-width:100%;"
    "border:1px solid rgba(128,128,128,.35);border-radius:8px;padding:12px 18px 14px"
)
_TABLE_CSS = "table-layout:auto;border-collapse:collapse;width:100%;margin:0"
_LABEL_CSS = "text-align:left;vertical-align:top;opacity:.6;padding:2px 18px 2px 0;width:8em"


@dataclass(frozen=True, eq=False, repr=False)
class Steps:
    """The steps that a trainer would get, in order."""

    manifest: Manifest
    config: DataConfig
    plan: Plan
    start_row: int
    is_on_ray: bool
    row_of: Callable[[int], Row]
    """row id -> the row, for a preview"""
    _first: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_first", self.plan.step_at(self.start_row))
        num_rows = self.plan.num_rows * (self.plan.num_epoch or 1)
        if self.start_row > num_rows:
            raise ConfigError(
                f"no step begins at row {self.start_row:,}: the rows of "
                f"{counted(self.plan.num_epoch or 1, 'epoch')} are {num_rows:,}"
            )

    def __len__(self) -> int:
        """Return the number of steps. Dropped rows leave their steps shorter, and none out."""
        return max(self.plan.num_steps - self._first, 0)

    def __iter__(self) -> Iterator[Step]:
        steps = self._on_ray() if self.is_on_ray else self._here()
        if not len(self):
            return
        with progress("making the first step"):
            first = next(steps)
        yield first
        yield from steps

    def _here(self) -> Iterator[Step]:
        return stages.local_steps(self.manifest, self.config, self.start_row)

    def _on_ray(self) -> Iterator[Step]:
        from miles.common import local_ray  # Ray: it takes seconds
        from miles.data.stream import pipeline

        with progress("starting Ray"):
            local_ray.connect(self.config.stream.loader_cpus, OBJECT_STORE_BYTES)
        data = pipeline.build(self.manifest, self.config, self.start_row)
        for block in pipeline.blocks(data):
            yield from unpack(block)

    def preview(self, step: Step, num_rows: int = 3) -> Preview:
        """Return the first samples of a step, as its micro-batches hold them, coloured by their mask."""
        rows = []
        for rank in step.micro_batches:
            for batch in rank:
                rows += [(row_id, encoded) for row_id, encoded in samples_of(batch)]
        shown = []
        for row_id, encoded in rows[:num_rows]:
            shown.append(_with_sample(self.row_of(row_id), encoded))
        return Preview(shown, f"{len(shown)} of the {len(rows):,} samples of step {step.index:,}")

    def lines(self) -> list[tuple[str, str]]:
        """Return the label and the value of each line of the card."""
        order, pack = self.config.order, self.config.pack
        shuffled = (
            f"shuffled by seed {order.seed}" if order.shuffle else "in the order of the files"
        )
        rows = f"{order.batch_size:,} a step of {self.plan.num_rows:,}, {shuffled}"
        begin = f", from row {self.start_row:,} on" if self.start_row else ""
        ranks = "one rank" if pack.dp_size == 1 else f"each of {pack.dp_size:,} ranks"
        where = "by loaders on Ray" if self.is_on_ray else "by this process, without Ray"
        return [
            ("steps", f"{len(self):,} in {counted(self.plan.num_epoch, 'epoch')}{begin}"),
            ("rows", rows),
            ("dropped rows", "leave their step shorter, and change no other step"),
            ("micro-batch", f"up to {pack.max_tokens_per_gpu:,} tokens on {ranks}"),
            ("made", where),
        ]

    def to_text(self, columns: int = 100) -> str:
        """Return the card as text of at most so many columns."""
        return as_text(Facts(self.lines(), indent=0), columns)

    def __repr__(self) -> str:
        order = self.config.order
        steps = f"{counted(len(self), 'step')} of {counted(order.batch_size, 'row')}"
        return f"Steps({steps}, {counted(self.plan.num_epoch, 'epoch')})"

    def _repr_html_(self) -> str:
        rows = ""
        for label, value in self.lines():
            rows += f'<tr style="background:transparent"><td style="{_LABEL_CSS}">{html.escape(label)}</td>'
            rows += f'<td style="text-align:left;padding:2px 0">{html.escape(value)}</td></tr>'
        return f'<div style="{_BOX_CSS}"><table style="{_TABLE_CSS}">{rows}</table></div>'


def samples_of(batch: MicroBatch) -> Iterator[tuple[int, Encoded]]:
    """Yield the row id and the sample of each segment of a micro-batch: labels are not shifted."""
    bounds = pairwise(batch.cu_seqlens.tolist())
    for row_id, (begin, end) in zip(batch.row_ids.tolist(), bounds, strict=True):
        if row_id != DUMMY_ROW_ID:
            mask = np.zeros(end - begin, np.uint8)
            mask[1:] = batch.loss_mask[begin : end - 1]
            yield row_id, Encoded(batch.input_ids[begin:end].astype(np.int32), mask)


def _with_sample(row: Row, encoded: Encoded) -> Row:
    return replace(row, encoded=encoded, reason=None, detail="")
