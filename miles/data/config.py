"""The settings of the data path: frozen, validated before anything starts, passed whole to their owner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles.errors import ConfigError

DEFAULT_WINDOW_ROWS = 32_768


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    name: str
    """How the source is called in metrics and in the ledger."""
    paths: tuple[str, ...]
    """fsspec URLs, globs or folders; Parquet, JSON lines (plain, .gz, .zst) or one JSON array."""
    messages_key: str | None = None
    """Column of the conversation (`--input-key`); None: found from the schema and the first rows."""
    tools_key: str | None = None
    """Column of the tools (`--tool-key`); None: "tools" where it is there."""

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

    def __post_init__(self) -> None:
        _require(self.batch_size > 0, f"--rollout-batch-size must be positive, not {self.batch_size}")
        _require(self.window_rows > 0, f"--shuffle-window must be positive, not {self.window_rows}")
        _require(self.num_epoch > 0, f"--num-epoch must be positive, not {self.num_epoch}")
        _require(0 <= self.seed < 2**63, f"--rollout-seed must be in [0, 2**63), not {self.seed}")

    @property
    def rounded_window_rows(self) -> int:
        return -(-self.window_rows // self.batch_size) * self.batch_size


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
    """Which assistant turns are trained: "all" or "last"; a row's own flags can only exclude."""
    empty_think: str = "mask"
    """An empty think block that the template puts before an answer: "mask" or "train"."""
    special_text: str = "allow"
    """Content that spells a special token: "allow" or "reject"."""
    max_sample_tokens: int = 8192
    """Longer samples are dropped, counted as too_long."""

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--loss-mask-turns", self.turns, ("all", "last")),
            ("--empty-think", self.empty_think, ("mask", "train")),
            ("--special-text", self.special_text, ("allow", "reject")),
        ):
            _require(value in allowed, f"{flag} must be one of {', '.join(allowed)}, not {value!r}")
        _require(self.max_sample_tokens > 1, f"--max-sample-tokens must be above 1, not {self.max_sample_tokens}")
        try:
            json.dumps(dict(self.template_kwargs))
        except TypeError as error:
            raise ConfigError(f"--apply-chat-template-kwargs must be a JSON object: {error}") from error


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
    target_block_bytes: int = 1 << 20
    """Ray Data cuts a stage's output into blocks of about this size."""
    max_retries: int = 3
    """How often a task whose worker died is tried again before the run fails."""

    def __post_init__(self) -> None:
        _require(self.loader_cpus > 0, f"--loader-cpus must be positive, not {self.loader_cpus}")
        _require(self.prefetch_steps > 0, f"--prefetch-steps must be positive, not {self.prefetch_steps}")


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

    def __post_init__(self) -> None:
        _require(bool(self.sources), "no data: give --prompt-data PATH, or NAME PATH pairs")
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), f"--prompt-data names a source twice: {names}")
        _require(
            self.encode.max_sample_tokens <= self.pack.capacity_tokens,
            f"--max-sample-tokens {self.encode.max_sample_tokens} exceeds what a micro-batch can hold, "
            f"--max-tokens-per-gpu x context parallel size = {self.pack.capacity_tokens}; sequences are never "
            "cut, so lower the first or raise the second",
        )
        _require(0 <= self.max_bad_fraction <= 1, "--max-bad-fraction must be between 0 and 1")
