"""The notebook's front door: settings as Python arguments, or complete, to a data set.

prepare("chat", source="chat.jsonl", tokenizer=…, max_sample_tokens=8192)    from a notebook
prepare_rows("chat", "chat.jsonl", RowFormat(…), EncodeConfig(…), …)         from `miles prepare`

Both count the rows, tell their shape from the first ones, certify the tokenizer, and return the
`Prepared` of dataset.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from miles.common.checked import checked
from miles.common.ctrl_c import on_ctrl_c
from miles.common.first_contact import first_contact
from miles.common.flags import build
from miles.common.progress import progress
from miles.data.config import DataConfig, EncodeConfig, RowFormat, SourceConfig
from miles.data.encoding import kept_encoders
from miles.data.files.manifest import build_manifest
from miles.data.files.openhermes import openhermes_sources
from miles.data.notebook.dataset import Prepared
from miles.data.notebook.every_row import RAY_ROWS
from miles.data.notebook.given_rows import file_of, paths_in
from miles.data.notebook.python_words import in_notebook
from miles.data.notebook.recipe import OPENHERMES, require_source
from miles.data.source_names import name_of
from miles.data.stream import stages
from miles.errors import ConfigError

_SOME_ROWS = ("rows.jsonl",)
"""Stands for rows that are given themselves, in the line that an error proposes."""


@checked
@in_notebook
@on_ctrl_c("stopped; nothing was written")
def prepare(
    dataset: str | None = None,
    *,
    source: Any = None,
    tokenizer: str,
    max_sample_tokens: int = EncodeConfig.max_sample_tokens,
    revision: str | None = None,
    messages_key: str | None = None,
    tools_key: str | None = None,
    row_shape: str = RowFormat.shape,
    column_names: Mapping[str, str] | None = None,
    role_names: Mapping[str, str] | None = None,
    transform: Any = None,
    split: str | None = SourceConfig.split,
    max_bad_fraction: float = DataConfig.max_bad_fraction,
    chat_template_path: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    turns: str = EncodeConfig.turns,
    empty_think: str = EncodeConfig.empty_think,
    empty_answer: str = EncodeConfig.empty_answer,
    history: str = EncodeConfig.history,
    special_text: str = EncodeConfig.special_text,
    too_long: str = EncodeConfig.too_long,
    trust_remote_code: bool = EncodeConfig.trust_remote_code,
    tokenizer_engine: str = EncodeConfig.tokenizer_engine,
) -> Prepared:
    """Count a data set's rows, tell their shape from the first ones, and certify the tokenizer.

    The settings of rows and of encoding are those of `miles train` (docs/flags.md), so that what is
    shown is what a run with the same settings trains.

    Args:
        dataset: the name that the source gets; None: that of its file or folder, or "rows".
            "openhermes", or None without a source, is OpenHermes-2.5.
        source: fsspec URLs, globs or folders, as texts or `pathlib.Path`, one or several; or the
            rows themselves: a list or iterator of dicts, a pandas or Polars data frame, an Arrow
            table, batch or reader, a `datasets.Dataset`, `DatasetDict` or `IterableDataset`, or a
            `ray.data.Dataset`. Rows keep their order, and are kept as a file in `$MILES_CACHE`,
            whose path is that of any file (docs/rows.md). For "openhermes" None means the hub.
        tokenizer: folder (fsspec URL) or hub name.
        max_sample_tokens: longest sample; `too_long` says what becomes of a longer one.
        revision: of the hub's data set.
        messages_key: column of the conversation; short for `column_names={"messages": …}`.
        tools_key: column of the tools; short for `column_names={"tools": …}`.
        row_shape: one of `config.ROW_FIELDS`, such as "messages"; "auto": found from the first
            rows.
        column_names: field of the shape (`config.ROW_FIELDS`) -> column; others are looked for
            under usual names.
        role_names: name of a role in the rows -> system, user, assistant, tool or tool_call; beside
            the known ones.
        transform: a function row -> row, list of messages or None (the row is left out), or its
            name, "package.module:function"; for rows of no known shape. It is called in the
            loaders, before anything else looks at a row.
        split: of a folder or DatasetDict, such as "train_sft", "train+validation" or "all"; None:
            train, where the names of its files say so.
        max_bad_fraction: a larger share of rejected rows is an error.
        chat_template_path: a Jinja file in place of the tokenizer's own template.
        template_kwargs: what the template gets beside the messages.
        turns: assistant turns that are trained: "all", "last" or "flags".
        empty_think: an empty think block before an answer: "mask" or "train".
        empty_answer: a row with an answer that would be trained and says nothing: "drop" or
            "train".
        history: earlier turns that a template changes: "as_served".
        special_text: content that spells a control token: "allow", "escape" or "reject".
        too_long: "drop", "truncate_end" or "error".
        trust_remote_code: run code that the tokenizer's folder brings.
        tokenizer_engine: what encodes text: "auto" (the fastest that is proven), "tiktoken",
            "fastokens" or "tokenizers". All give the same ids.

    Raises:
        MilesError: files that cannot be read, rows of no known shape, values in them that JSON does
            not know, or a tokenizer that cannot be certified.
    """
    _require_filled(dataset=dataset, tokenizer=tokenizer)
    paths = paths_in(source)
    if dataset is None:
        dataset = OPENHERMES if source is None else _name_of(paths)
    require_source(
        dataset,
        _SOME_ROWS if paths is None else paths,
        lambda name, path: f"prepare({name!r}, source={path!r}, tokenizer=…)",
    )
    rows = {
        "--row-shape": row_shape,
        "--column-names": column_names,
        "--input-key": messages_key,
        "--tool-key": tools_key,
        "--role-names": role_names,
        "--transform": transform,
    }
    encoding = {
        "--chat-template-path": chat_template_path,
        "--apply-chat-template-kwargs": template_kwargs,
        "--loss-mask-turns": turns,
        "--empty-think": empty_think,
        "--empty-answer": empty_answer,
        "--history": history,
        "--special-text": special_text,
        "--too-long": too_long,
        "--max-sample-tokens": max_sample_tokens,
        "--trust-remote-code": trust_remote_code,
        "--tokenizer-engine": tokenizer_engine,
    }

    row_format = build(RowFormat, rows)
    encode = build(EncodeConfig, encoding, {"tokenizer": tokenizer})
    if paths is None:
        # Settings that are wrong have been refused before an iterator is read.
        paths = (file_of(source, split),)
        split = None
    prepared = prepare_rows(
        dataset,
        paths,
        row_format,
        encode,
        revision=revision,
        split=split,
        max_bad_fraction=max_bad_fraction,
    )
    prepared.is_in_python = True
    return prepared


def _require_filled(**arguments: str | None) -> None:
    """Refuse a text that is empty."""
    for name, value in arguments.items():
        if value is not None and not value.strip():
            raise ConfigError(f"prepare: {name} is empty, such as a variable that is not set")


def _name_of(paths: Sequence[str] | None) -> str:
    """Return the name of a source that has none: that of its path, as `--prompt-data` names it."""
    names = {name_of(path) for path in paths or ()}
    return names.pop() if len(names) == 1 else "rows"


def prepare_rows(
    dataset: str,
    source: Sequence[str] | None,
    row_format: RowFormat,
    encode: EncodeConfig,
    *,
    revision: str | None,
    split: str | None,
    max_bad_fraction: float,
) -> Prepared:
    """Do what `prepare` does, from settings that are complete.

    Args:
        source: paths; None for the hub.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction must be between 0 and 1, not {max_bad_fraction}")
    if dataset == OPENHERMES:
        sources = openhermes_sources(source or None, revision, row_format, split)
    else:
        if revision is not None:
            raise ConfigError(
                f"--revision {revision}: is one of {OPENHERMES} on the hub; {dataset} has its own "
                "files: leave it out"
            )
        sources = (SourceConfig(dataset, tuple(source or ()), row_format, split),)
    with first_contact(), warnings.catch_warnings():
        # tqdm, which transformers imports, has a warning for notebooks without ipywidgets.
        warnings.filterwarnings("ignore", message="IProgress not found")
        with progress("certifying the tokenizer and its chat template"):
            first = kept_encoders.first_engine(encode)
        with progress("listing the files and counting their rows"):
            manifest = build_manifest(sources)
        if manifest.num_rows >= RAY_ROWS:
            with progress("proving the fastest engine of the tokenizer"):
                stages.encoder_of(encode)
            first = encode
        return Prepared(manifest, sources, encode, first, max_bad_fraction)
