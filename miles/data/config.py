"""The settings of the data path: frozen, validated before anything starts, passed whole to their owner."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from miles.errors import ConfigError

DEFAULT_WINDOW_ROWS = 32_768
MAX_WEIGHT_PERIOD = 1 << 22
"""Of weights in whole numbers, the largest sum: the rows after which a mixture's sequence of sources comes again."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


ROW_FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
}
"""Shape of a row -> what it is made of. "messages" are ShareGPT's and OpenAI's, told apart turn by turn."""

ROLE_NAMES = ("system", "user", "assistant", "tool")
"""Roles of a normalized message."""


@dataclass(frozen=True)
class RowFormat:
    """What the rows of a source look like."""

    shape: str = "auto"
    """One of `ROW_FIELDS` (`--row-shape`), or "auto": found from the schema and the first rows."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of `ROW_FIELDS` -> the column that holds it (`--column-names`; `--input-key` for "messages",
    `--tool-key` for "tools"); what is not named is looked for under the usual names."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Name of a role in the rows -> one of `ROLE_NAMES` (`--role-names`), beside the known ones."""

    def __post_init__(self) -> None:
        shapes = ("auto", *ROW_FIELDS)
        _require(
            self.shape in shapes,
            f"--row-shape must be one of {', '.join(shapes)}, not {self.shape!r}",
        )
        fields = ROW_FIELDS[self.shape] if self.shape != "auto" else sum(ROW_FIELDS.values(), ())
        for name, column in self.columns.items():
            known = ", ".join(dict.fromkeys(fields))
            _require(
                name in fields,
                f"--column-names: {name!r} is no field of --row-shape {self.shape}: {known}",
            )
            _require(
                isinstance(column, str),
                f"--column-names: {name!r} must be the name of a column, not {column!r}",
            )
        for name, role in self.roles.items():
            _require(
                role in ROLE_NAMES,
                f"--role-names: {name!r} must be one of {', '.join(ROLE_NAMES)}, not {role!r}",
            )


def named_columns(
    columns: Mapping[str, str] | None, messages_key: str | None, tools_key: str | None
) -> dict[str, str]:
    """`--column-names` together with its shorthands.

    Args:
        messages_key: `--input-key`, the column of "messages".
        tools_key: `--tool-key`, the column of "tools".

    Raises:
        ConfigError: both name a column for the same field, and not the same one.
    """
    named = dict(columns or {})
    for flag, field_name, column in (
        ("--input-key", "messages", messages_key),
        ("--tool-key", "tools", tools_key),
    ):
        if column is not None:
            other = named.setdefault(field_name, column)
            _require(
                other == column,
                f"{flag} {column}: --column-names says {field_name} is {other!r}; give one of them",
            )
    return named


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    name: str
    """How the source is called in metrics and in the ledger."""
    paths: tuple[str, ...]
    """fsspec URLs, globs or folders; Parquet, JSON lines (plain, .gz, .zst) or one JSON array."""
    format: RowFormat = RowFormat()

    def __post_init__(self) -> None:
        _require(bool(self.paths), f"source {self.name!r} has no path")


@dataclass(frozen=True)
class OrderConfig:
    """What fixes the sequence of rows. Every field but `num_epoch` is part of the cursor."""

    batch_size: int = 128
    """Rows of the input that one optimizer step takes (`--rollout-batch-size`)."""
    seed: int = 42
    """`--rollout-seed`"""
    shuffle: bool = False
    """`--rollout-shuffle`; False: file order"""
    window_rows: int = DEFAULT_WINDOW_ROWS
    """Rows shuffled among each other; rounded up to a multiple of `batch_size`."""
    drop_last: bool = False
    """Leave out the short step at an epoch's end."""
    num_epoch: int = 1
    weights: tuple[float, ...] = ()
    """One a source (`--prompt-data-weights`), on any scale: its share of every step. Empty: the sources are one set, of
    which an epoch takes each row once."""

    def __post_init__(self) -> None:
        _require(
            self.batch_size > 0, f"--rollout-batch-size must be positive, not {self.batch_size}"
        )
        _require(self.window_rows > 0, f"--shuffle-window must be positive, not {self.window_rows}")
        _require(self.num_epoch > 0, f"--num-epoch must be positive, not {self.num_epoch}")
        _require(0 <= self.seed < 2**63, f"--rollout-seed must be in [0, 2**63), not {self.seed}")

        _require(
            all(math.isfinite(weight) and weight > 0 for weight in self.weights),
            f"--prompt-data-weights must be positive numbers, not {self.weights}; leave out what is not wanted",
        )
        _require(
            sum(self.integer_weights) <= MAX_WEIGHT_PERIOD,
            f"--prompt-data-weights {' '.join(map(repr, self.weights))} have no common measure that is large enough; "
            "give round numbers, such as 0.7 0.3 or 7 3",
        )

    @property
    def rounded_window_rows(self) -> int:
        return -(-self.window_rows // self.batch_size) * self.batch_size

    @property
    def integer_weights(self) -> tuple[int, ...]:
        """`weights` as the smallest whole numbers of the same proportions: 0.75 0.25 -> 3 1. Decimals are taken as they
        are written."""
        exact = [Fraction(repr(float(weight))) for weight in self.weights]
        whole = [int(share * math.lcm(*(share.denominator for share in exact))) for share in exact]
        return tuple(weight // math.gcd(*whole) for weight in whole)


@dataclass(frozen=True)
class EncodeConfig:
    """How a conversation becomes tokens, and which of them are trained. Part of the cursor."""

    tokenizer: str
    """Folder (fsspec URL) or hub name of a Hugging Face tokenizer (`--hf-checkpoint`)."""
    chat_template: str | None = None
    """The template's text (from `--chat-template-path`); None: the tokenizer's own."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """`--apply-chat-template-kwargs`, e.g. {"enable_thinking": false}."""
    turns: str = "all"
    """Which assistant turns are trained (`--loss-mask-turns`): "all", "last" (of the conversation), or "flags": those
    that the row expressly flags to be trained. A row's flags exclude turns under each."""
    empty_think: str = "mask"
    """An empty think block that the template puts before an answer (`--empty-think`): "mask" or "train"."""
    history: str = "as_served"
    """What earlier turns look like where a template changes them (`--history`): "as_served", as it renders them."""
    special_text: str = "allow"
    """Content that spells a control token (`--special-text`): "allow", it becomes that token; "escape", ordinary text
    instead; "reject"."""
    too_long: str = "drop"
    """A sample over `max_sample_tokens` (`--too-long`): "drop", "truncate_end" or "error"."""
    max_sample_tokens: int = 8192
    trust_remote_code: bool = False
    """Whether a tokenizer may bring code of its own that is run (`--trust-remote-code`)."""

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--loss-mask-turns", self.turns, ("all", "last", "flags")),
            ("--empty-think", self.empty_think, ("mask", "train")),
            ("--history", self.history, ("as_served",)),
            ("--special-text", self.special_text, ("allow", "escape", "reject")),
            ("--too-long", self.too_long, ("drop", "truncate_end", "error")),
        ):
            _require(value in allowed, f"{flag} must be one of {', '.join(allowed)}, not {value!r}")
        _require(
            self.max_sample_tokens > 1,
            f"--max-sample-tokens must be above 1, not {self.max_sample_tokens}",
        )
        try:
            json.dumps(dict(self.template_kwargs))
        except TypeError as error:
            raise ConfigError(
                f"--apply-chat-template-kwargs must be a JSON object: {error}"
            ) from error


@dataclass(frozen=True)
class PackConfig:
    """How a step is split over ranks. Changes no step's content."""

    dp_size: int = 1
    max_tokens_per_gpu: int = 8192
    """Tokens of a micro-batch on one GPU."""
    context_parallel_size: int = 1
    """A micro-batch holds max_tokens_per_gpu x context_parallel_size tokens."""

    def __post_init__(self) -> None:
        _require(self.dp_size > 0, f"the data-parallel size must be positive, not {self.dp_size}")
        _require(
            self.max_tokens_per_gpu > 1,
            f"--max-tokens-per-gpu must be above 1, not {self.max_tokens_per_gpu}",
        )

    @property
    def capacity_tokens(self) -> int:
        return self.max_tokens_per_gpu * self.context_parallel_size


@dataclass(frozen=True)
class StreamConfig:
    """How much of the cluster the loader takes. Changes nothing of what it delivers."""

    loader_cpus: int = 1
    """CPUs that the loading stages may use together (`--loader-cpus`)."""
    prefetch_steps: int = 8
    """Ready steps that the feed holds (`--prefetch-steps`); the queue depth's upper bound."""
    target_block_bytes: int = 4 << 20
    """Ray Data cuts a stage's output into blocks of about this size."""
    max_retries: int = 3
    """How often a task whose worker died is tried again before the run fails."""

    def __post_init__(self) -> None:
        _require(self.loader_cpus > 0, f"--loader-cpus must be positive, not {self.loader_cpus}")
        _require(
            self.prefetch_steps > 0, f"--prefetch-steps must be positive, not {self.prefetch_steps}"
        )


@dataclass(frozen=True)
class DataConfig:
    """Everything that the data path needs to know."""

    sources: tuple[SourceConfig, ...]
    order: OrderConfig
    encode: EncodeConfig
    pack: PackConfig = PackConfig()
    stream: StreamConfig = StreamConfig()
    max_bad_fraction: float = 0.01
    """More rejected rows than this share of the rows read ends the run (`--max-bad-fraction`)."""
    max_bad_rows_in_a_row: int = 1_000
    """So many rejected rows one after the other end the run (`--max-bad-rows-in-a-row`)."""
    held_out_fraction: float = 0.0
    """Share of the rows that are held out, chosen by a hash of what they say (`--eval-fraction`)."""
    held_out: str = "leave_out"
    """What this stream does with them: "leave_out" (training), or gives "only" them (evaluation)."""

    def __post_init__(self) -> None:
        _require(bool(self.sources), "no data: give --prompt-data PATH, or NAME PATH pairs")
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), f"--prompt-data names a source twice: {names}")
        _require(
            len(self.order.weights) in (0, len(names)),
            f"--prompt-data-weights gives {len(self.order.weights)} number(s) for {len(names)} source(s): "
            f"{', '.join(names)}; give one for each",
        )
        _require(
            self.encode.max_sample_tokens <= self.pack.capacity_tokens,
            f"--max-sample-tokens {self.encode.max_sample_tokens} exceeds what a micro-batch can hold, "
            f"--max-tokens-per-gpu x context parallel size = {self.pack.capacity_tokens}; sequences are never "
            "cut, so lower the first or raise the second",
        )
        _require(0 <= self.max_bad_fraction <= 1, "--max-bad-fraction must be between 0 and 1")
        _require(self.max_bad_rows_in_a_row > 0, "--max-bad-rows-in-a-row must be positive")
        _require(
            0 <= self.held_out_fraction < 1,
            f"--eval-fraction must be in [0, 1), not {self.held_out_fraction}",
        )
        assert self.held_out in ("leave_out", "only")
