"""A data set that was prepared: to count, to look at, to write, or to train on.

ds = prepare("openhermes", source="rows.jsonl", tokenizer="Qwen/Qwen3-4B-Base")   # prepare.py
ds                       # a card; its numbers are those of a sample until `write` read every row
ds.preview(3)            # conversations coloured by their mask
ds.write("messages/")    # part-00000.parquet …, manifest.json, rejects.jsonl, summary.json
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from miles.common import lease, run_folder, storage
from miles.common.checked import checked
from miles.common.debugging import unchained
from miles.common.local_paths import absolute
from miles.common.writable import require_writable
from miles.data.config import (
    DEFAULT_WINDOW_ROWS,
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    SourceConfig,
    StreamConfig,
)
from miles.data.files.group_sizes import largest_read_rows, require_small_groups
from miles.data.files.manifest import Manifest
from miles.data.files.read import read_rows
from miles.data.notebook.card import Card, Summary
from miles.data.notebook.every_row import OBJECT_STORE_BYTES, on_ray, read_every_row
from miles.data.notebook.output_folder import ENCODER, require_replaceable
from miles.data.notebook.parts import PartFiles
from miles.data.notebook.preview import Preview
from miles.data.packing.shards import unpack
from miles.data.rows import message_parts
from miles.data.stream import stages
from miles.data.stream.row_outcomes import RowOutcome, row_outcome
from miles.data.types import Encoded, Int64, RowRejected, Step
from miles.data.unused_names import count_row
from miles.errors import ConfigError

if TYPE_CHECKING:
    import ray

SAMPLE_ROWS = 2_000
"""Rows that a card is made from until all have been read."""
CANDIDATES_A_ROW = 20
"""Rows that a preview looks at for each that it shows; rejected ones are passed over."""


class Prepared:
    """A data set ready to be looked at, written, or trained on."""

    def __init__(
        self,
        manifest: Manifest,
        sources: tuple[SourceConfig, ...],
        encode: EncodeConfig,
        first: EncodeConfig,
        max_bad_fraction: float,
    ) -> None:
        self.manifest = manifest
        self._sources = sources
        self._encode = encode
        # With the engine that is ready soonest, for rows that are read once. Ids are the same.
        self._first = first
        self._max_bad_fraction = max_bad_fraction
        self._summary: Summary | None = None
        self._is_sample = True
        self._rejects: list[dict[str, Any]] | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return self.manifest.source_names

    @property
    def num_rows(self) -> int:
        return self.manifest.num_rows

    @property
    def settings(self) -> DataConfig:
        """The rows and their encoding, as a run takes them: `miles.train.run(prompt_data=ds)`."""
        return replace(self._config(), encode=self._encode)

    @unchained
    def summary(self) -> Summary:
        """Return the numbers of a sample spread over the set, or, after `write`, of all rows."""
        if self._summary is None:
            self._summary = self._summarize_sample()
            self._is_sample = self._summary.num_rows < self.num_rows
        return self._summary

    @checked
    @unchained
    def preview(self, num_rows: int = 3) -> Preview:
        """Return the first usable conversations, coloured by their mask."""
        num_candidates = min(self.num_rows, CANDIDATES_A_ROW * num_rows)
        samples: list[tuple[int, Encoded]] = []
        for row_id, outcome in self._outcomes(np.arange(num_candidates, dtype=np.int64)):
            if isinstance(outcome.result, Encoded) and len(samples) < num_rows:
                samples.append((row_id, outcome.result))
        return Preview(samples, stages.encoder_of(self._first).tokenizer)

    @checked
    @unchained
    def write(self, url: str, *, overwrite: bool = False, loader_cpus: int | None = None) -> None:
        """Write every usable row as OpenAI messages, or plain text as text.

        The folder gets part-00000.parquet and so on, rejects.jsonl, summary.json, manifest.json.

        Args:
            url: a folder (fsspec URL). Without `overwrite`, it is empty, or holds what an earlier
                write of the same rows under the same settings left.
            overwrite: replace other prepared rows there.
            loader_cpus: that read and encode, through Ray; None: all that there are. A small data
                set is read by this process alone. Changes nothing of what is written.

        Raises:
            MilesError: a source that fails, or too many rejected rows; a folder with other content,
                or that another process is writing.
        """
        if not url:
            raise ConfigError(
                "write: url is empty, such as a variable that is not set; give a path"
            )
        if loader_cpus is not None and loader_cpus < 1:
            raise ConfigError(f"write: loader_cpus must be at least 1, not {loader_cpus}")
        url = absolute(url)
        require_writable(url, "the folder to write")
        self._require_no_source_in(url)
        fingerprint = stages.encoder_of(self._first).fingerprint
        with lease.hold(url, "--output", "miles prepare", Console(stderr=True, markup=False).print):
            require_replaceable(url, self.manifest, fingerprint, overwrite=overwrite)
            self._write_all(url, fingerprint, loader_cpus)

    def _write_all(self, url: str, encoder_fingerprint: str, loader_cpus: int | None) -> None:
        """Write the rows, what was dropped, the counts, and the manifest, into a folder."""
        try:
            with PartFiles(url) as parts:
                ledger, summary = read_every_row(
                    self.manifest, self._config(), url, parts, loader_cpus
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Ctrl-C: {url} may have parts, and has no manifest: it is not complete. The same "
                "command begins anew"
            ) from None
        self._summary = summary
        self._is_sample = False
        self._rejects = ledger.rejects

        content = {
            "rows": summary.num_rows,
            "written": len(summary.lengths),
            "tokens": summary.num_tokens,
            "trained_tokens": summary.num_trained_tokens,
            "ledger": ledger.summary(),
            ENCODER: encoder_fingerprint,
        }
        storage.write_text(storage.join(url, run_folder.SUMMARY), json.dumps(content, indent=1))
        # The manifest is last: a folder that has one is complete.
        storage.write_text(storage.join(url, run_folder.MANIFEST), self.manifest.to_json())

    @unchained
    def ledger(self) -> list[dict[str, Any]]:
        """Return every rejected row, `{source, file, row, reason, detail}`; read all rows once."""
        if self._rejects is None:
            ledger, self._summary = read_every_row(self.manifest, self._config(), None, None, None)
            self._is_sample = False
            self._rejects = ledger.rejects
        return self._rejects

    @checked
    @unchained
    def steps(
        self,
        *,
        batch_size: int,
        max_tokens_per_gpu: int,
        dp_size: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        num_epoch: int = 1,
        start_row: int = 0,
        loader_cpus: int = 1,
    ) -> Iterator[Step]:
        """Yield the steps that a trainer would get, in order, as they are ready.

        Args:
            batch_size: rows of a step.
            max_tokens_per_gpu: capacity of a micro-batch.
            dp_size: ranks that a step is split over.
            start_row: `next_row` of the last step that was taken.

        Raises:
            ConfigError: `max_sample_tokens` of `prepare` exceeds `max_tokens_per_gpu`.
            SourceError: a row group, or a compressed file, has too many rows: it would be read
                again and again.
        """
        order = OrderConfig(
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            window_rows=DEFAULT_WINDOW_ROWS if shuffle else self._file_order_rows(),
            num_epoch=num_epoch,
        )
        require_small_groups(self.manifest, order.rounded_window_rows)
        config = DataConfig(
            self._sources,
            order,
            self._encode,
            PackConfig(dp_size, max_tokens_per_gpu),
            StreamConfig(loader_cpus),
        )

        from miles.common import local_ray  # Ray: it takes seconds
        from miles.data.stream import pipeline

        local_ray.connect(loader_cpus, OBJECT_STORE_BYTES)
        for block in pipeline.blocks(pipeline.build(self.manifest, config, start_row)):
            yield from unpack(block)

    @unchained
    def to_ray(self) -> ray.data.Dataset:
        """Return a Ray data set with the columns of `MESSAGES`, one row a conversation."""
        from miles.data.stream import pipeline  # Ray: it takes seconds

        return pipeline.build_messages(self.manifest, on_ray(self._config(), None))

    def _config(self) -> DataConfig:
        # A window has the rows of a file: no more than one is made at a time in each loader.
        limits = message_parts.LIMITS
        window_rows = max(limits.part_rows, largest_read_rows(self.manifest))
        return DataConfig(
            self._sources,
            OrderConfig(batch_size=limits.group_rows, window_rows=window_rows),
            self._first,
            PackConfig(1, self._first.max_sample_tokens),
            StreamConfig(),
            self._max_bad_fraction,
        )

    def _file_order_rows(self) -> int:
        """Return the rows of a window in file order.

        They are no fewer than those of a row group, which would otherwise be read more than once.
        """
        return max(DEFAULT_WINDOW_ROWS, largest_read_rows(self.manifest))

    def _require_no_source_in(self, url: str) -> None:
        """Refuse to write over a source: an earlier write's parts are removed first."""
        target = storage.filesystem(url)[1].rstrip("/") + "/"
        for source in self.manifest.sources:
            for file in source.files:
                if storage.filesystem(file.path)[1].startswith(target):
                    raise ConfigError(
                        f"{url}: the source {file.path} lies in the folder to write; name another "
                        "folder"
                    )

    def _summarize_sample(self) -> Summary:
        num_sampled = min(SAMPLE_ROWS, self.num_rows)
        row_ids = np.unique(np.linspace(0, self.num_rows - 1, num_sampled).astype(np.int64))
        sources = self.manifest.source_of(row_ids).tolist()
        lengths: list[int] = []
        num_trained_tokens = 0
        reasons: Counter[str] = Counter()
        unused_keys: dict[str, dict[str, int]] = {}

        for source, (_, outcome) in zip(sources, self._outcomes(row_ids), strict=True):
            if isinstance(outcome.result, RowRejected):
                reasons[outcome.result.reason] += 1
            else:
                lengths.append(len(outcome.result.input_ids))
                num_trained_tokens += int(outcome.result.loss_mask.sum())
            if outcome.unused_keys:
                name = self.manifest.source_names[source]
                count_row(unused_keys.setdefault(name, {}), outcome.unused_keys)

        return Summary(
            len(row_ids), np.array(lengths, np.int64), num_trained_tokens, reasons, unused_keys
        )

    def _outcomes(self, row_ids: Int64) -> Iterator[tuple[int, RowOutcome]]:
        """Encode rows here, without Ray."""
        encoder = stages.encoder_of(self._first)
        sources = self.manifest.source_of(row_ids)
        payloads = read_rows(self.manifest, row_ids)
        for row_id, source, payload in zip(row_ids.tolist(), sources, payloads, strict=True):
            row_format = self.manifest.sources[int(source)].format
            yield row_id, row_outcome(payload, row_format, encoder)

    def _card(self) -> Card:
        return Card(self.manifest, self.summary(), self._is_sample)

    @unchained
    def to_text(self, columns: int = 100) -> str:
        """Return the card as text of at most so many columns."""
        return self._card().to_text(columns)

    def __repr__(self) -> str:
        return self.to_text()

    @unchained
    def _repr_html_(self) -> str:
        return self._card().to_html()
