"""The notebook's front door: a data set named, counted, looked at, written as messages, or fed to a trainer.

ds = prepare("openhermes", source="rows.jsonl", tokenizer="Qwen/Qwen3-4B-Base")
ds                          # a card; token numbers from a stated sample until `write` has seen every row
ds.write("messages/")       # part-00000.parquet …, manifest.json, rejects.jsonl, summary.json
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.common import local_ray, run_folder, storage
from miles.common.flags import build
from miles.data.config import (
    DEFAULT_WINDOW_ROWS,
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
    StreamConfig,
)
from miles.data.files.group_sizes import largest_read_rows, require_small_groups
from miles.data.files.manifest import Manifest, ManifestSource, build_manifest
from miles.data.files.openhermes import openhermes_sources
from miles.data.files.read import read_rows
from miles.data.files.row_shapes import MAIN_FIELDS
from miles.data.notebook import preview
from miles.data.packing.shards import unpack
from miles.data.rows.messages_parquet import WRITTEN, ToMessages
from miles.data.stream import pipeline, row_outcomes, stages
from miles.data.stream.ledger import Ledger, fatal_reasons
from miles.data.types import Encoded, Int64, RowRejected, Step, StepRows
from miles.errors import ConfigError

SAMPLE_ROWS = 2_000
GROUP_ROWS = 1_000
FILE_ROWS = 100_000
OBJECT_STORE_BYTES = 512 << 20


def prepare(
    dataset: str = "openhermes",
    *,
    source: str | Sequence[str] | None = None,
    tokenizer: str,
    max_sample_tokens: int = EncodeConfig.max_sample_tokens,
    revision: str | None = None,
    messages_key: str | None = None,
    tools_key: str | None = None,
    row_shape: str = RowFormat.shape,
    column_names: Mapping[str, str] | None = None,
    role_names: Mapping[str, str] | None = None,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
    chat_template_path: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    turns: str = EncodeConfig.turns,
    empty_think: str = EncodeConfig.empty_think,
    history: str = EncodeConfig.history,
    special_text: str = EncodeConfig.special_text,
    too_long: str = EncodeConfig.too_long,
    trust_remote_code: bool = EncodeConfig.trust_remote_code,
) -> Prepared:
    """Count a data set's rows, tell their shape from the first ones, and certify the tokenizer.

    The settings of rows and of encoding are those of `miles train` (docs/flags.md), so that what is shown is what a run
    with the same settings trains.

    Args:
        dataset: "openhermes", or the name that the source gets.
        source: fsspec URLs, globs or folders; for "openhermes" None means the hub.
        tokenizer: folder (fsspec URL) or hub name.
        max_sample_tokens: longest sample; `too_long` says what becomes of a longer one.
        revision: of the hub's data set.
        messages_key: column of the conversation; short for `column_names={"messages": …}`.
        tools_key: column of the tools; short for `column_names={"tools": …}`.
        row_shape: "messages", "alpaca", "prompt_completion" or "text"; "auto": found from the first rows.
        column_names: field of the shape (`config.ROW_FIELDS`) -> column; others are looked for under usual names.
        role_names: name of a role in the rows -> system, user, assistant or tool; beside the known ones.
        max_bad_fraction: a larger share of rejected rows is an error.
        chat_template_path: a Jinja file in place of the tokenizer's own template.
        template_kwargs: what the template gets beside the messages.
        turns: assistant turns that are trained: "all", "last" or "flags".
        empty_think: an empty think block before an answer: "mask" or "train".
        history: earlier turns that a template changes: "as_served".
        special_text: content that spells a control token: "allow", "escape" or "reject".
        too_long: "drop", "truncate_end" or "error".
        trust_remote_code: run code that the tokenizer's folder brings.

    Raises:
        MilesError: files that cannot be read, rows of no known shape, or a tokenizer that cannot be certified.
    """
    rows = {
        "--row-shape": row_shape,
        "--column-names": column_names,
        "--input-key": messages_key,
        "--tool-key": tools_key,
        "--role-names": role_names,
    }
    encoding = {
        "--chat-template-path": chat_template_path,
        "--apply-chat-template-kwargs": template_kwargs,
        "--loss-mask-turns": turns,
        "--empty-think": empty_think,
        "--history": history,
        "--special-text": special_text,
        "--too-long": too_long,
        "--max-sample-tokens": max_sample_tokens,
        "--trust-remote-code": trust_remote_code,
    }
    return prepare_rows(
        dataset,
        source,
        build(RowFormat, rows),
        build(EncodeConfig, encoding, {"tokenizer": tokenizer}),
        revision=revision,
        max_bad_fraction=max_bad_fraction,
    )


def prepare_rows(
    dataset: str,
    source: str | Sequence[str] | None,
    row_format: RowFormat,
    encode: EncodeConfig,
    *,
    revision: str | None,
    max_bad_fraction: float,
) -> Prepared:
    """Do what `prepare` does, from settings that are complete."""
    if dataset == "openhermes":
        sources = openhermes_sources(source, revision, row_format)
    else:
        paths = (source,) if isinstance(source, str) else tuple(source or ())
        sources = (SourceConfig(dataset, paths, row_format),)
    stages.encoder_of(encode)
    return Prepared(build_manifest(sources), sources, encode, max_bad_fraction)


@dataclass(frozen=True)
class Summary:
    """Numbers of a data set, of all its rows or of a sample."""

    num_rows: int
    """that were looked at"""
    lengths: Int64
    """int64 [usable rows]: tokens of each"""
    num_trained_tokens: int
    reasons: dict[str, int]

    def lines(self, set_rows: int) -> list[tuple[str, str]]:
        """Label and value of each line of a card; of a sample the token count is scaled up to the set's rows."""
        tokens = int(self.lengths.sum())
        total = (
            f"{tokens:,}"
            if set_rows == self.num_rows
            else f"about {round(tokens * set_rows / self.num_rows, -3):,.0f}"
        )
        quantiles = (
            np.percentile(self.lengths, [50, 90, 99]).astype(int)
            if len(self.lengths)
            else [0, 0, 0]
        )
        dropped = (
            ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
            or "none"
        )
        return [
            ("tokens", f"{total} ({tokens / max(len(self.lengths), 1):.0f} a row)"),
            ("trained", f"{self.num_trained_tokens / max(tokens, 1):.1%} of the tokens"),
            (
                "row length",
                f"median {quantiles[0]:,} · 90 % {quantiles[1]:,} · 99 % {quantiles[2]:,} tokens",
            ),
            ("dropped", f"{dropped} of {self.num_rows:,} rows"),
        ]


class Preview:
    """Conversations coloured by their mask, for a terminal and for a notebook."""

    def __init__(self, samples: Sequence[tuple[int, Encoded]], tokenizer: Any) -> None:
        self._samples, self._tokenizer = samples, tokenizer

    def __rich__(self) -> Text:
        text = Text()
        for row_id, sample in self._samples:
            text.append(
                f"row {row_id} · {len(sample.input_ids)} tokens, {int(sample.loss_mask.sum())} trained\n",
                "bold",
            )
            text.append_text(preview.to_text(sample, self._tokenizer)).append("\n")
        return text

    def __repr__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    def _repr_html_(self) -> str:
        return "".join(
            f'<div style="font:14px system-ui,sans-serif;margin-top:.8em"><b>row {row_id}</b>'
            f"{preview.to_html(sample, self._tokenizer)}</div>"
            for row_id, sample in self._samples
        )


class Prepared:
    """A data set ready to be looked at, written, or trained on."""

    def __init__(
        self,
        manifest: Manifest,
        sources: tuple[SourceConfig, ...],
        encode: EncodeConfig,
        max_bad_fraction: float,
    ) -> None:
        self.manifest, self._sources, self._encode = manifest, sources, encode
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

    def summary(self) -> Summary:
        """Of a sample spread over the set, or, after `write`, of all rows."""
        if self._summary is None:
            ids = np.unique(
                np.linspace(0, self.num_rows - 1, min(SAMPLE_ROWS, self.num_rows)).astype(np.int64)
            )
            encoded = [self._encode_row(row_id, payload) for row_id, payload in self._payloads(ids)]
            samples = [sample for sample in encoded if isinstance(sample, Encoded)]
            reasons = [sample.reason for sample in encoded if isinstance(sample, RowRejected)]
            self._summary = Summary(
                len(ids),
                np.array([len(sample.input_ids) for sample in samples], np.int64),
                sum(int(sample.loss_mask.sum()) for sample in samples),
                {reason: reasons.count(reason) for reason in set(reasons)},
            )
            self._is_sample = len(ids) < self.num_rows
        return self._summary

    def preview(self, num_rows: int = 3) -> Preview:
        """The first usable conversations, coloured by their mask."""
        samples: list[tuple[int, Encoded]] = []
        for row_id, payload in self._payloads(
            np.arange(min(self.num_rows, 20 * num_rows), dtype=np.int64)
        ):
            sample = self._encode_row(row_id, payload)
            if isinstance(sample, Encoded) and len(samples) < num_rows:
                samples.append((row_id, sample))
        return Preview(samples, stages.encoder_of(self._encode).tokenizer)

    def write(self, url: str) -> None:
        """Writes every usable row as OpenAI messages, or as the text that it is: parts, manifest, rejects, summary.

        Args:
            url: a folder (fsspec URL).

        Raises:
            MilesError: a source that fails, or too many dropped rows.
        """
        target = storage.filesystem(url)[1].rstrip("/") + "/"
        for path in (file.path for source in self.manifest.sources for file in source.files):
            if storage.filesystem(path)[1].startswith(
                target
            ):  # an earlier write's parts are removed first
                raise ConfigError(
                    f"{url}: the source {path} lies in the folder to write; name another folder"
                )
        with _Parts(url) as parts:
            ledger, summary = self._pass(url, parts)
        self._summary, self._is_sample, self._rejects = summary, False, ledger.rejects
        storage.write_text(
            storage.join(url, run_folder.SUMMARY),
            json.dumps(
                {
                    "rows": summary.num_rows,
                    "written": len(summary.lengths),
                    "tokens": int(summary.lengths.sum()),
                    "trained_tokens": summary.num_trained_tokens,
                    "ledger": ledger.summary(),
                    "encoder_fingerprint": stages.encoder_of(self._encode).fingerprint,
                },
                indent=1,
            ),
        )
        storage.write_text(storage.join(url, run_folder.MANIFEST), self.manifest.to_json())

    def ledger(self) -> list[dict[str, Any]]:
        """Every dropped row: `{source, file, row, reason, detail}`. Passes over the whole set once."""
        if self._rejects is None:
            ledger, self._summary = self._pass(None, None)
            self._rejects, self._is_sample = ledger.rejects, False
        return self._rejects

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
        """The steps that a trainer would get, in order, as they are ready.

        Args:
            batch_size: rows of a step.
            max_tokens_per_gpu: capacity of a micro-batch.
            dp_size: ranks that a step is split over.
            start_row: `next_row` of the step to go on after.

        Raises:
            ConfigError: `max_sample_tokens` of `prepare` exceeds `max_tokens_per_gpu`.
            SourceError: a row group, or a compressed file, of so many rows that it would be read again and again.
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
        local_ray.connect(loader_cpus, OBJECT_STORE_BYTES)
        for block in pipeline.blocks(pipeline.build(self.manifest, config, start_row)):
            yield from unpack(block)

    def to_ray(self) -> ray.data.Dataset:
        """A Ray data set with the columns of `WRITTEN`, one row a conversation."""
        config = self._config()
        local_ray.connect(config.stream.loader_cpus, OBJECT_STORE_BYTES)
        return pipeline.build_prepared(self.manifest, config).map_batches(
            ToMessages(self.manifest.source_names), batch_size=None, batch_format="pyarrow"
        )

    def _config(self) -> DataConfig:
        return DataConfig(
            self._sources,
            OrderConfig(batch_size=GROUP_ROWS, window_rows=self._file_order_rows()),
            self._encode,
            PackConfig(1, self._encode.max_sample_tokens),
            StreamConfig(loader_cpus=1),
            self._max_bad_fraction,
        )

    def _file_order_rows(self) -> int:
        """Rows of a window in file order, which is streamed: none so small that a row group is read for many."""
        return max(DEFAULT_WINDOW_ROWS, largest_read_rows(self.manifest))

    def _pass(self, url: str | None, parts: _Parts | None) -> tuple[Ledger, Summary]:
        """Reads every row once, through Ray Data."""
        config = self._config()
        local_ray.connect(config.stream.loader_cpus, OBJECT_STORE_BYTES)
        ledger = Ledger(
            self.manifest,
            storage.join(url, run_folder.REJECTS) if url else None,
            self._max_bad_fraction,
            max_bad_rows_in_a_row=config.max_bad_rows_in_a_row,
            fatal_reasons=fatal_reasons(self._encode),
        )
        to_messages = ToMessages(self.manifest.source_names)
        lengths, trained, reasons, num_rows = [], 0, dict[str, int](), 0
        for row in pipeline.iterate(pipeline.build_prepared(self.manifest, config)):
            values = row.drop_columns(["conversations"]).to_pylist()[0]
            step_rows = StepRows.from_columns(values)
            ledger.commit(values["step"], step_rows)
            lengths += values["sample_lengths"]
            trained += sum(values["sample_trained_tokens"])
            num_rows += values["num_rows"]
            for reject in step_rows.rejects:
                reasons[reject.reason] = reasons.get(reject.reason, 0) + 1
            if parts:
                parts.add(to_messages(row))
        ledger.judge()
        return ledger, Summary(num_rows, np.array(lengths, np.int64), trained, reasons)

    def _payloads(self, row_ids: Int64) -> Iterator[tuple[int, bytes]]:
        return zip(row_ids.tolist(), read_rows(self.manifest, row_ids), strict=True)

    def _encode_row(self, row_id: int, payload: bytes) -> Encoded | RowRejected:
        source = self.manifest.sources[int(self.manifest.source_of(np.array([row_id]))[0])]
        return row_outcomes.encode_row(payload, source.format, stages.encoder_of(self._encode))

    def _card(self) -> list[tuple[str, str]]:
        summary = self.summary()
        files = sum(len(source.files) for source in self.manifest.sources)
        basis = (
            f"from a sample of {summary.num_rows:,} rows" if self._is_sample else "every row read"
        )
        return [
            ("rows", f"{self.num_rows:,} in {files} file(s)"),
            ("sources", ", ".join(_with_shape(source) for source in self.manifest.sources)),
            *summary.lines(self.num_rows),
            ("numbers", basis),
        ]

    def __repr__(self) -> str:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for label, value in self._card():
            table.add_row(label, value)
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip("\n")

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:left;opacity:.65;padding:.15em 1.2em .15em 0">{label}</td>'
            f'<td style="text-align:left;padding:.15em 0">{html.escape(value)}</td></tr>'
            for label, value in self._card()
        )
        return (
            '<div style="font:14px system-ui,sans-serif;border:1px solid #8884;border-radius:8px;padding:.8em 1.1em;'
            f'display:inline-block"><b>{html.escape(", ".join(self.sources))}</b><table>{rows}</table></div>'
        )


class _Parts:
    """Parquet files of a folder, one after the other, in the order of the rows."""

    def __init__(self, url: str) -> None:
        self._fs, self._folder = storage.filesystem(url)
        self._number, self._rows = 0, 0
        self._stream: Any = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Parts:
        self._fs.makedirs(self._folder, exist_ok=True)
        # What an earlier write left would be read back as rows of this one; the manifest says that all is there.
        left = [
            *self._fs.glob(f"{self._folder}/part-*.parquet"),
            f"{self._folder}/{run_folder.MANIFEST}",
        ]
        for path in left:
            if self._fs.exists(path):
                self._fs.rm_file(path)
        return self

    def add(self, table: pa.Table) -> None:
        if self._writer is None:
            self._stream = self._fs.open(f"{self._folder}/part-{self._number:05d}.parquet", "wb")
            self._writer = pq.ParquetWriter(self._stream, WRITTEN)
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._rows += table.num_rows
        if self._rows >= FILE_ROWS:
            self._finish()

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._stream.close()
            self._writer = None
            self._number, self._rows = self._number + 1, 0


def _with_shape(source: ManifestSource) -> str:
    """`openhermes (messages in conversations)`"""
    shape = source.format.shape.replace("_", " and ")
    columns = ", ".join(
        source.columns[field]
        for field in MAIN_FIELDS[source.format.shape]
        if field in source.columns
    )
    return f"{source.name} ({shape} in {columns})" if columns else f"{source.name} ({shape})"
