"""The settings of the data path: frozen, and checked before anything starts.

A setting is declared here with its flag (`miles.common.flags`), and nowhere else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any

from miles.common.counts import counted
from miles.common.flags import Flag, check_settings, require
from miles.common.local_paths import absolute, absolute_or_hub_name
from miles.common.mistakes import Mistakes
from miles.common.shown import shown
from miles.data.row_format import ROLE_NAMES as ROLE_NAMES
from miles.data.row_format import ROW_FIELDS as ROW_FIELDS
from miles.data.row_format import RowFormat as RowFormat
from miles.errors import ConfigError

DEFAULT_WINDOW_ROWS = 32_768
_DETECTED = RowFormat()
MAX_WEIGHT_PERIOD = 1 << 22
"""The largest sum of weights as whole numbers. A mixture's sequence repeats after this sum."""


def _require_split(split: str | None) -> None:
    """Refuse an empty name of a split, and the shares that Megatron calls a split."""
    if split is None:
        return
    require(
        all(name.strip() for name in split.split("+")),
        f"--split {shown(split)}: a name is empty; give such as train, train+validation, or all",
    )
    require(
        not re.fullmatch(r"[\d.,]+", split),
        f"--split {split}: shares of one set, as in Megatron-LM, are not supported. --split takes "
        "the name of a split, such as train; --eval-fraction holds a share of the rows out",
    )


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    name: str
    """The source's name in metrics and in the ledger."""
    paths: tuple[str, ...]
    """fsspec URLs, patterns or folders, local ones absolute; Parquet, Arrow, JSON or CSV."""
    format: RowFormat = _DETECTED
    split: Annotated[
        str | None,
        Flag(
            "--split",
            "NAME",
            "splits of a source's folder, told by the names of its files, such as train_sft, "
            "train+validation, or all; one word, or one a source",
            default="train, where names say so",
            written_as=tuple[str, ...],
        ),
    ] = None
    """Of a folder or pattern; names with `+` between them, or "all"; None: train, where names say
    so, or for evaluation validation, or else test. A file that is named itself is read."""
    is_evaluation: bool = False
    """The rows are evaluated, not trained on."""

    def __post_init__(self) -> None:
        check_settings(self)
        _require_split(self.split)
        require(
            bool(self.paths),
            f"source {shown(self.name)} has no path; give at least one file, glob or folder",
        )
        object.__setattr__(self, "paths", tuple(map(absolute, self.paths)))


@dataclass(frozen=True)
class OrderConfig:
    """The order of the rows. Every field but `num_epoch` and `max_steps` is part of the
    cursor."""

    batch_size: Annotated[
        int,
        Flag(
            "--rollout-batch-size",
            "ROWS",
            "rows of the input in one step, which is one optimizer step",
            minimum=1,
            also=(Flag("--global-batch-size", "ROWS", "the same number by another name"),),
        ),
    ] = 128
    seed: Annotated[int, Flag("--rollout-seed", "SEED", "seed of the shuffle")] = 42
    shuffle: Annotated[
        bool, Flag("--rollout-shuffle", help="shuffle by seed and epoch; without it: file order")
    ] = False
    window_rows: Annotated[
        int,
        Flag(
            "--shuffle-window",
            "ROWS",
            "rows shuffled among each other; rounded up to a multiple of the batch size",
            minimum=1,
        ),
    ] = DEFAULT_WINDOW_ROWS
    drop_last: Annotated[
        bool, Flag("--drop-last", help="leave out the short step at an epoch's end")
    ] = False
    num_epoch: Annotated[
        int | None,
        Flag(
            "--num-epoch",
            "N",
            "times over the rows",
            minimum=1,
            default="as many as --num-rollout takes, or else 1",
        ),
    ] = None
    max_steps: int | None = None
    """Steps that the run will take of the order; without `num_epoch`, its epochs follow from it."""
    weights: Annotated[
        tuple[float, ...],
        Flag(
            "--prompt-data-weights",
            "WEIGHT",
            "one a source, on any scale: its share of every step",
            default="all rows once an epoch",
        ),
    ] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        mistakes = Mistakes()
        mistakes.require(
            0 <= self.seed < 2**63, f"--rollout-seed must be in [0, 2**63), not {self.seed}"
        )
        mistakes.require(
            all(math.isfinite(weight) and weight > 0 for weight in self.weights),
            f"--prompt-data-weights must be positive numbers, not {self.weights}; leave out the "
            "sources that are not wanted",
        )
        mistakes.raise_all()
        require(
            sum(self.integer_weights) <= MAX_WEIGHT_PERIOD,
            f"--prompt-data-weights {' '.join(map(repr, self.weights))} have no common measure "
            "that is large enough; give round numbers, such as 0.7 0.3 or 7 3",
        )

    @property
    def rounded_window_rows(self) -> int:
        return -(-self.window_rows // self.batch_size) * self.batch_size

    @property
    def integer_weights(self) -> tuple[int, ...]:
        """`weights` as the smallest whole numbers of the same proportions: 0.75 0.25 -> 3 1.

        Decimals count as they are written.
        """
        exact = [Fraction(repr(float(weight))) for weight in self.weights]
        denominator = math.lcm(*(share.denominator for share in exact))
        numerators = [int(share * denominator) for share in exact]
        return tuple(numerator // math.gcd(*numerators) for numerator in numerators)


@dataclass(frozen=True)
class EncodeConfig:
    """The tokens of a conversation, and which of them are trained. Part of the cursor."""

    tokenizer: str
    """Folder (fsspec URL) or hub name: `--hf-checkpoint` of a run, `--tokenizer` elsewhere."""
    chat_template: Annotated[
        str | None,
        Flag(
            "--chat-template-path",
            "FILE",
            "a Jinja file in place of the tokenizer's own template; exports carry it",
            is_file=True,
        ),
    ] = None
    """The template's text; None: the tokenizer's own."""
    template_kwargs: Annotated[
        Mapping[str, Any],
        Flag(
            "--apply-chat-template-kwargs",
            "JSON",
            'what the template gets beside the messages, such as {"enable_thinking": false}',
        ),
    ] = field(default_factory=dict)
    turns: Annotated[
        str,
        Flag(
            "--loss-mask-turns",
            "TURNS",
            "assistant turns that are trained: all, the last of a conversation, or only those that "
            "a row flags; a turn that a row flags 0 never is",
            choices=("all", "last", "flags"),
        ),
    ] = "all"
    empty_think: Annotated[
        str,
        Flag(
            "--empty-think",
            "POLICY",
            "an empty think block that the template puts before an answer: mask it, or train it",
            choices=("mask", "train"),
        ),
    ] = "mask"
    empty_answer: Annotated[
        str,
        Flag(
            "--empty-answer",
            "POLICY",
            "an answer that would be trained and says nothing (no text, no reasoning, no tool "
            "call): drop the row, or train the model to end at once",
            choices=("drop", "train"),
        ),
    ] = "drop"
    history: Annotated[
        str,
        Flag(
            "--history",
            "POLICY",
            "earlier turns that a template changes: as_served, as it renders them",
            choices=("as_served",),
        ),
    ] = "as_served"
    special_text: Annotated[
        str,
        Flag(
            "--special-text",
            "POLICY",
            "content that spells a control token: allow it to become that token, escape it into "
            "ordinary text, or reject the row",
            choices=("allow", "escape", "reject"),
        ),
    ] = "allow"
    too_long: Annotated[
        str,
        Flag(
            "--too-long",
            "POLICY",
            "a sample over --max-sample-tokens: drop it, cut its end, or end with an error",
            choices=("drop", "truncate_end", "error"),
        ),
    ] = "drop"
    max_sample_tokens: Annotated[
        int,
        Flag(
            "--max-sample-tokens",
            "TOKENS",
            "longest sample; see --too-long",
            minimum=2,
            default="--max-tokens-per-gpu",
        ),
    ] = 8192
    trust_remote_code: Annotated[
        bool, Flag("--trust-remote-code", help="run code that the tokenizer's folder brings")
    ] = False
    tokenizer_engine: Annotated[
        str,
        Flag(
            "--tokenizer-engine",
            "ENGINE",
            "what encodes text: auto is the fastest that is installed and proven to give the "
            "tokenizer's ids. In no fingerprint: a run goes on with another",
            choices=("auto", "tiktoken", "fastokens", "tokenizers"),
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "tokenizer", absolute_or_hub_name(self.tokenizer))
        try:
            json.dumps(dict(self.template_kwargs))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"--apply-chat-template-kwargs must be a JSON object: {error}"
            ) from error
        for key in _keys_in(self.template_kwargs):
            require(
                isinstance(key, str),
                "--apply-chat-template-kwargs must be a JSON object, whose keys are text, not "
                f"{shown(key)}",
            )


def _keys_in(value: Any) -> Iterator[Any]:
    """Yield the keys of a value of JSON, and of all that is nested in it."""
    if isinstance(value, Mapping):
        yield from value
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _keys_in(inner)


@dataclass(frozen=True)
class PackConfig:
    """The division of a step over ranks. Changes no step's content."""

    dp_size: int = 1
    """Data-parallel ranks; follows from the layout of a run."""
    max_tokens_per_gpu: Annotated[
        int,
        Flag(
            "--max-tokens-per-gpu",
            "TOKENS",
            "tokens of a micro-batch: as many as fit into memory",
            minimum=2,
        ),
    ] = 8192
    context_parallel_size: int = 1
    """A micro-batch holds max_tokens_per_gpu x context_parallel_size tokens."""

    def __post_init__(self) -> None:
        check_settings(self)
        require(self.dp_size > 0, f"the data-parallel size must be positive, not {self.dp_size}")

    @property
    def capacity_tokens(self) -> int:
        return self.max_tokens_per_gpu * self.context_parallel_size


@dataclass(frozen=True)
class StreamConfig:
    """The loader's share of the cluster. Changes nothing of what it delivers."""

    loader_cpus: Annotated[
        int,
        Flag("--loader-cpus", "CPUS", "CPUs that read, encode and pack, together", minimum=1),
    ] = 1
    prefetch_steps: Annotated[
        int,
        Flag(
            "--prefetch-steps",
            "STEPS",
            "steps that the feed holds ready: the most that the queue depth can be",
            minimum=1,
        ),
    ] = 8
    target_block_bytes: int = 4 << 20
    """Ray Data cuts a stage's output into blocks of about this size; past 32 ranks, the feed's blocks
    have this size for each 32."""
    max_retries: int = 3
    """Times that a task whose worker died is tried again before the run fails."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class DataConfig:
    """The data of a run: its sources, and the limits on bad rows."""

    sources: Annotated[
        tuple[SourceConfig, ...],
        Flag(
            "--prompt-data",
            "PATH",
            "the rows: one path, or NAME PATH pairs for a mixture",
            written_as=tuple[str, ...],
        ),
    ]
    order: OrderConfig
    encode: EncodeConfig
    pack: PackConfig = PackConfig()
    stream: StreamConfig = StreamConfig()
    max_bad_fraction: Annotated[
        float,
        Flag("--max-bad-fraction", "SHARE", "a larger share of rejected rows ends the run"),
    ] = 0.01
    max_bad_rows_in_a_row: Annotated[
        int,
        Flag(
            "--max-bad-rows-in-a-row",
            "ROWS",
            "this many rejected rows in a row end the run",
            minimum=1,
        ),
    ] = 1_000
    held_out_fraction: Annotated[
        float,
        Flag(
            "--eval-fraction",
            "SHARE",
            "in place of --eval-prompt-data: a share of the training rows, chosen by a hash of "
            "their content and not trained on",
            choice="evaluation rows",
        ),
    ] = 0.0
    held_out: str = "leave_out"
    """The use of held-out rows in a stream: "leave_out" (training), or "only" (evaluation)."""

    def __post_init__(self) -> None:
        check_settings(self)
        mistakes = Mistakes()
        mistakes.require(bool(self.sources), "no data: give --prompt-data PATH, or NAME PATH pairs")
        names = [source.name for source in self.sources]
        mistakes.require(
            len(set(names)) == len(names),
            f"--prompt-data names a source twice: {', '.join(names)}; give each its own name",
        )

        mistakes.require(
            len(self.order.weights) in (0, len(names)),
            f"--prompt-data-weights gives {counted(len(self.order.weights), 'number')} for "
            f"{counted(len(names), 'source')}: {', '.join(names)}; give one for each",
        )

        mistakes.require(
            self.encode.max_sample_tokens <= self.pack.capacity_tokens,
            f"--max-sample-tokens {self.encode.max_sample_tokens} exceeds what a micro-batch can "
            "hold, --max-tokens-per-gpu x context parallel size = "
            f"{self.pack.capacity_tokens}; sequences are never cut, so lower the first or raise "
            "the second",
        )

        mistakes.require(
            0 <= self.max_bad_fraction <= 1,
            f"--max-bad-fraction must be between 0 and 1, not {self.max_bad_fraction}",
        )
        mistakes.require(
            0 <= self.held_out_fraction < 1,
            f"--eval-fraction must be in [0, 1), not {self.held_out_fraction}",
        )
        mistakes.raise_all()
        assert self.held_out in ("leave_out", "only")
