"""A data set that was prepared: to count, to look at, to write, or to train on.

ds = prepare("openhermes", source="rows.jsonl", tokenizer="Qwen/Qwen3-4B-Base")   # prepare.py
ds                       # a card; its numbers are those of a sample until `write` read every row
ds.preview(3)            # conversations coloured by their mask
ds[12]                   # a row: what was read, its messages, ids and mask, or why it is dropped
ds.write("messages/")    # part-00000.parquet …, manifest.json, rejects.jsonl, summary.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from rich.console import Console

from miles.common import lease, run_folder, storage
from miles.common.checked import checked
from miles.common.counts import counted
from miles.common.local_paths import absolute
from miles.common.progress import progress
from miles.common.shown import shown
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
from miles.data.notebook.card import UNKNOWN_ROLE, Card, Summary, unknown_roles
from miles.data.notebook.choose import chosen, drawn, require_where
from miles.data.notebook.every_row import RAY_ROWS, on_ray, read_every_row
from miles.data.notebook.output_folder import ENCODER, require_replaceable
from miles.data.notebook.parts import PartFiles
from miles.data.notebook.preview import Preview
from miles.data.notebook.python_words import in_notebook, say_of
from miles.data.notebook.rejects import Rejects
from miles.data.notebook.row import Row, raw_of
from miles.data.notebook.sample import Sample
from miles.data.notebook.steps import Steps
from miles.data.rows import message_parts
from miles.data.stream import stages
from miles.data.stream.ledger import Ledger
from miles.data.stream.row_outcomes import RowOutcome, row_outcomes
from miles.data.types import Encoded, Int64, RowRejected
from miles.errors import ConfigError

if TYPE_CHECKING:
    import ray

SAMPLE_ROWS = 2_000
"""Rows that a card is made from until all have been read."""
CANDIDATES_A_ROW = 20
"""Rows that a preview looks at for each that it shows; rejected ones are passed over."""

ROWS_AT_A_TIME = 256
"""Rows that an iteration reads together."""


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
        self.is_in_python = False
        """a notebook speaks of arguments, a command of flags"""
        self._sources = sources
        self._encode = encode
        # With the engine that is ready soonest, for rows that are read once. Ids are the same.
        self._first = first
        self._max_bad_fraction = max_bad_fraction
        self._sample: Sample | None = None
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

    @in_notebook
    def summary(self) -> Summary:
        """Return the numbers of a sample spread over the set, or, after `write`, of all rows."""
        if self._summary is None:
            self._summary = self._looked().summary
            self._is_sample = self._summary.num_rows < self.num_rows
        return self._summary

    # --- rows

    def __len__(self) -> int:
        """Return the number of rows, dropped ones among them."""
        return self.num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Preview: ...

    @in_notebook
    def __getitem__(self, index: int | slice) -> Row | Preview:
        """Return a row by its place in the set, from 0 or from the end, or the rows of a slice.

        Raises:
            IndexError: there is no such row.
        """
        if isinstance(index, slice):
            ids = np.arange(self.num_rows, dtype=np.int64)[index]
            return Preview(
                list(self._rows(ids)), f"{len(ids):,} of {counted(self.num_rows, 'row')}"
            )
        (row,) = self._rows(np.array([self._row_id(index)], np.int64))
        return row

    def __iter__(self) -> Iterator[Row]:
        """Yield every row in the order of the files, dropped ones among them."""
        for begin in range(0, self.num_rows, ROWS_AT_A_TIME):
            end = min(begin + ROWS_AT_A_TIME, self.num_rows)
            yield from self._rows(np.arange(begin, end, dtype=np.int64))

    @checked
    @in_notebook
    def preview(
        self,
        num_rows: int = 3,
        *,
        rows: Sequence[int] | None = None,
        where: str | None = None,
        seed: int = 0,
    ) -> Preview:
        """Return conversations coloured by their mask: the first usable ones, or as asked.

        Which rows were looked at to choose from, all or a sample, stands above them.

        Args:
            num_rows: how many are shown.
            rows: these, by their place in the set (from 0, or -1 for the last one); a dropped one is
                shown as it stands, with the reason and what to do.
            where: "longest", "least_trained" (by the share of trained tokens), "dropped" or
                "random".
            seed: of the random ones.

        Raises:
            ConfigError: `where` is none of these, or is given beside `rows`; there is no such row.
        """
        require_where(where)
        if rows is not None and where is not None:
            raise ConfigError("preview: rows and where both say which rows to show; give one")
        if seed < 0:
            raise ConfigError(f"preview: seed must not be negative, not {seed}")
        if num_rows < 1:
            raise ConfigError(f"preview: num_rows must be at least 1, not {num_rows}")
        if rows is not None:
            return Preview(list(self._rows(self._row_ids(rows))))
        if where in (None, "random"):
            return self._usable(num_rows, seed if where else None)

        looked = self._looked()
        ids = chosen(looked.rows, str(where), num_rows)
        basis = f"{where.replace('_', ' ')} of {self._basis(looked)}" if where else ""
        if not len(ids):
            basis = f"none {basis}"
        return Preview(list(self._rows(ids)), basis)

    def _usable(self, num_rows: int, seed: int | None) -> Preview:
        """Return the first usable rows, or usable ones drawn by a seed."""
        num_candidates = min(self.num_rows, CANDIDATES_A_ROW * num_rows)
        ids = np.arange(num_candidates, dtype=np.int64)
        if seed is not None:
            ids = drawn(self.num_rows, num_candidates, seed)

        shown: list[Row] = []
        num_passed = 0
        for begin in range(0, len(ids), num_rows):
            for row in self._rows(ids[begin : begin + num_rows]):
                if len(shown) < num_rows and row.encoded is not None:
                    shown.append(row)
                elif len(shown) < num_rows:
                    num_passed += 1
            if len(shown) == num_rows:
                break

        which = "the first rows" if seed is None else f"rows drawn by seed {seed}"
        dropped = f", {num_passed:,} dropped ones passed over" if num_passed else ""
        return Preview(shown, f"{which} of {self.num_rows:,}{dropped}")

    def _basis(self, looked: Sample) -> str:
        num_looked = len(looked.rows.row_ids)
        if num_looked == self.num_rows:
            return f"all {counted(self.num_rows, 'row')}"
        return f"a sample of {num_looked:,} rows of {self.num_rows:,}"

    def _row_id(self, index: int) -> int:
        if not isinstance(index, Integral) or isinstance(index, bool):
            raise TypeError(
                f"ds[…] takes a whole number or a slice, not {shown(index)}; several rows are "
                "ds.preview(rows=[…])"
            )
        row_id = index + self.num_rows if index < 0 else index
        if not 0 <= row_id < self.num_rows:
            raise IndexError(
                f"there is no row {index}: the data set has {counted(self.num_rows, 'row')}"
            )
        return int(row_id)

    def _row_ids(self, rows: Sequence[int]) -> Int64:
        try:
            return np.array([self._row_id(row) for row in rows], np.int64)
        except IndexError as error:
            raise ConfigError(f"preview: {error}") from None

    def _rows(self, row_ids: Int64) -> Iterator[Row]:
        """Yield rows in the order asked, read and encoded by this process."""
        tokenizer = stages.encoder_of(self._first).tokenizer
        num_files = sum(len(source.files) for source in self.manifest.sources)
        for row_id, payload, outcome in self._outcomes(row_ids):
            source, file, file_row = self.manifest.locate(row_id)
            rejected = outcome.result if isinstance(outcome.result, RowRejected) else None
            yield Row(
                row_id=row_id,
                source=source,
                file=file,
                file_row=file_row,
                raw=raw_of(payload),
                conversation=outcome.conversation,
                encoded=outcome.result if isinstance(outcome.result, Encoded) else None,
                reason=rejected.reason if rejected else None,
                detail=rejected.detail if rejected else "",
                tokenizer=tokenizer,
                is_of_one_file=num_files == 1,
                say=say_of(self),
            )

    # --- files

    @checked
    @in_notebook
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

    def _take(self, ledger: Ledger, summary: Summary) -> None:
        """Keep the numbers and the dropped rows of all rows."""
        self._rejects = ledger.rejects
        details = [
            str(reject["detail"]) for reject in self._rejects if reject["reason"] == UNKNOWN_ROLE
        ]
        self._summary = replace(summary, unknown_roles=unknown_roles(details))
        self._is_sample = False

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
        self._take(ledger, summary)

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

    @property
    @in_notebook
    def ledger(self) -> Rejects:
        """Every rejected row, `{source, file, row, reason, detail}`; all rows are read once."""
        if self._rejects is None:
            # However many were dropped: the list is what one looks at then.
            config = replace(self._config(), max_bad_fraction=1.0)
            self._take(*read_every_row(self.manifest, config, None, None, None))
        assert self._rejects is not None
        return Rejects(self._rejects, self.num_rows, say_of(self))

    # --- steps

    @checked
    @in_notebook
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
        loader_cpus: int | None = None,
    ) -> Steps:
        """Return the steps that a trainer would get, in order: an object with a length and a card.

        Args:
            batch_size: rows of a step.
            max_tokens_per_gpu: capacity of a micro-batch.
            dp_size: ranks that a step is split over.
            start_row: `next_row` of the last step that was taken.
            loader_cpus: that read and encode, through Ray; None: this process does, without Ray,
                where the set has fewer than 100,000 rows, or else one loader. Changes no step.

        Raises:
            ConfigError: `max_sample_tokens` of `prepare` exceeds `max_tokens_per_gpu`, or no step
                begins at `start_row`.
            SourceError: a row group, or a compressed file, has too many rows: it would be read
                again and again.
        """
        is_on_ray = loader_cpus is not None or self.num_rows >= RAY_ROWS
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
            self._encode if is_on_ray else self._first,
            PackConfig(dp_size, max_tokens_per_gpu),
            StreamConfig(1 if loader_cpus is None else loader_cpus),
        )
        plan = stages.make_plan(self.manifest, config)
        return Steps(self.manifest, config, plan, start_row, is_on_ray, self.__getitem__)

    @in_notebook
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

    def _looked(self) -> Sample:
        """Return what became of rows spread over the set, or of all of a small one; once."""
        if self._sample is None:
            num_sampled = min(SAMPLE_ROWS, self.num_rows)
            row_ids = np.unique(np.linspace(0, self.num_rows - 1, num_sampled).astype(np.int64))
            sources = self.manifest.source_of(row_ids).tolist()
            names = [self.manifest.source_names[source] for source in sources]
            with progress("encoding a sample of the rows", total=len(row_ids)) as bar:
                outcomes = []
                for _, _, outcome in self._outcomes(row_ids):
                    outcomes.append(outcome)
                    bar.advance()
            self._sample = Sample.of(row_ids, names, outcomes)
        return self._sample

    def _outcomes(self, row_ids: Int64) -> Iterator[tuple[int, bytes, RowOutcome]]:
        """Read and encode rows here, without Ray: yield the id, the bytes and the outcome of each."""
        encoder = stages.encoder_of(self._first)
        formats = [
            self.manifest.sources[source].format
            for source in self.manifest.source_of(row_ids).tolist()
        ]
        payloads = read_rows(self.manifest, row_ids)
        outcomes = row_outcomes(payloads, formats, encoder)
        yield from zip(row_ids.tolist(), payloads, outcomes, strict=True)

    def _card(self) -> Card:
        return Card(self.manifest, self.summary(), self._is_sample, say_of(self))

    @in_notebook
    def to_text(self, columns: int = 100) -> str:
        """Return the card as text of at most so many columns."""
        return self._card().to_text(columns)

    def __repr__(self) -> str:
        names = ", ".join(self.sources)
        return f"Prepared({names}: {counted(self.num_rows, 'row')}; its card as text: .to_text())"

    @in_notebook
    def _repr_html_(self) -> str:
        return self._card().to_html()
