"""The records that pass between stages: frozen dataclasses, and Arrow schemas where Ray carries them.

    RAW_STEP      read    -> encode    a step's rows as JSON text
    ENCODED_STEP  encode  -> pack      a step's samples as token ids and masks, in row order
    PACKED_STEP   pack    -> feed      the same samples, laid out rank by rank, micro-batch by micro-batch
    PREPARED_STEP read    -> prepare   a step's conversations as OpenAI messages, with their token counts

One Arrow row is one step, in every stage. `Encoded.loss_mask` marks *tokens* that are trained;
`MicroBatch.loss_mask` marks *positions* whose label (the next token of the same segment) is trained.
Only packing shifts from one to the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from miles.errors import CheckpointError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

DUMMY_ROW_ID = -1
"""`row_ids` of a segment that only keeps a rank in step: its loss mask is all zero."""

REJECT_REASONS = (
    "malformed_json",  # the line or payload is not JSON, or not UTF-8
    "not_an_object",  # JSON, but not an object
    "no_messages",  # the conversation is missing, null or empty
    "bad_message",  # a message that is not an object, or whose content is not text
    "unknown_role",
    "special_text",  # content spells a special token, under special_text="reject"
    "template_error",  # the chat template raised
    "unlocatable_turn",  # an assistant turn whose tokens cannot be told exactly
    "nothing_to_train",
    "too_long",  # more than max_sample_tokens
)
"""Every reason for which a row can be dropped."""


@dataclass(frozen=True)
class Conversation:
    """One row, normalized: OpenAI messages, tools, and what the row says of each turn; or plain text."""

    messages: tuple[Mapping[str, Any], ...]
    """`{"role", "content", ...}`; roles are system, user, assistant, tool. Empty for plain text."""
    tools: tuple[Mapping[str, Any], ...] | None
    flags: tuple[bool | None, ...]
    """One for each message: whether the row says that it is trained; None where it says nothing."""
    text: str | None = None
    """A row that is no conversation: trained on in whole, without a chat template."""


@dataclass(frozen=True)
class Reject:
    """Why a row was dropped. It never holds the row's text."""

    row_id: int
    """Position of the row in the manifest's order."""
    source_id: int
    reason: str
    """One of `REJECT_REASONS`."""
    detail: str
    position: int = 0
    """Which of its step's rows it is, those left out (`source_held_out`) not counted: rows of a step are consumed in
    this order."""


class RowRejected(Exception):
    """Raised by the pure stages for a row that cannot be used; becomes a `Reject`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REJECT_REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Encoded:
    """What the model sees of one conversation, and which tokens are trained."""

    input_ids: Int32
    """int32 [tokens]"""
    loss_mask: UInt8
    """uint8 [tokens]: 1 where the token is trained"""
    num_straddling_tokens: int = 0
    """Tokens that begin before a trained span and end inside it; they are not trained."""
    is_truncated: bool = False
    """Whether tokens at its end were cut off (`too_long="truncate_end"`)."""


@dataclass(frozen=True)
class MicroBatch:
    """Whole samples laid end to end, each an attention segment of its own."""

    input_ids: Int64
    """int64 [tokens]"""
    labels: Int64
    """int64 [tokens]: the next token of the same segment; 0 at a segment's last position"""
    position_ids: Int64
    """int64 [tokens]: 0, 1, 2, … within each segment"""
    loss_mask: Float32
    """float32 [tokens]: 1 where `labels` is trained"""
    cu_seqlens: Int32
    """int32 [segments + 1]: where each segment begins, and the end of the last"""
    source_ids: Int32
    """int32 [segments]"""
    row_ids: Int64
    """int64 [segments]; `DUMMY_ROW_ID` for a segment that is only there to keep the rank busy"""


@dataclass(frozen=True)
class StepReport:
    """What a step held and what it cost to make, beside the micro-batches themselves."""

    index: int
    """0 for the first step of the run, counting over epochs"""
    epoch: float
    """epochs consumed once this step is trained"""
    next_row: int
    """`consumed_rows` of a cursor taken after this step: where a resume starts"""
    num_rows: int
    """rows of the input: used, rejected or held out"""
    num_samples: int
    num_tokens: int
    num_causal_pairs: int = field(default=0, kw_only=True)
    """sum over samples of L (L + 1) / 2: pairs of a token and one that it attends to, itself included"""
    num_trained_tokens: int
    """positions whose label is trained, over the whole global batch"""
    num_straddling_tokens: int
    fingerprint: str
    """xxh64 of ids and masks in sample order, hex"""
    pack_fill: float
    """tokens / (micro-batches x capacity)"""
    dp_imbalance: float
    """tokens of the fullest rank / mean over ranks"""
    source_rows: tuple[int, ...]
    source_trained_tokens: tuple[int, ...]
    source_truncated: tuple[int, ...]
    """samples that were cut at the end, of each source"""
    source_held_out: tuple[int, ...] = field(default=(), kw_only=True)
    """rows of each source that this stream leaves to the other one: held out of training, or from an evaluation stream
    those that are not (`DataConfig.held_out`); empty: none"""
    rejects: tuple[Reject, ...]
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """seconds of one loader process in each stage"""
    queue_depth: int = 0
    """steps ready when this one was first asked for, before it was handed out; 0 means the trainer waited"""
    wait_seconds: float = 0.0
    """how long the first rank that asked for this step waited"""


@dataclass(frozen=True, eq=False)
class Chunk:
    """One data rank's share of steps that travel together, end to end and not yet shifted."""

    reports: tuple[StepReport, ...]
    """one a step, without what is measured when it is handed out"""
    step_micro_batches: Int32
    """int32 [steps]"""
    micro_batch_segments: Int32
    """int32 [micro-batches]"""
    segment_lengths: Int32
    """int32 [segments], in tokens"""
    segment_row_ids: Int64
    """int64 [segments]"""
    segment_source_ids: Int32
    """int32 [segments]"""
    input_ids: Int32
    """int32 [tokens]"""
    loss_mask: UInt8
    """uint8 [tokens]: whether the token is trained"""


@dataclass(frozen=True)
class Step:
    """One optimizer step's data: the report, and micro-batches for every data-parallel rank."""

    report: StepReport
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    """[dp_size][micro-batches a rank]: as many on every rank"""

    @property
    def index(self) -> int:
        return self.report.index

    @property
    def epoch(self) -> float:
        return self.report.epoch

    @property
    def fingerprint(self) -> str:
        return self.report.fingerprint

    @property
    def num_rows(self) -> int:
        return self.report.num_rows

    @property
    def num_trained_tokens(self) -> int:
        return self.report.num_trained_tokens

    @property
    def next_row(self) -> int:
        return self.report.next_row


CURSOR_VERSION = 2


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data. JSON in each checkpoint; every field but the counts must match to resume."""

    consumed_rows: int
    seed: int
    shuffle: bool
    window_rows: int
    batch_size: int
    drop_last: bool
    mixture: tuple[int, ...]
    """weights of the sources in whole numbers; empty: one set"""
    manifest_fingerprint: str
    encoder_fingerprint: str
    tokens_seen: int = 0
    """trained tokens consumed so far"""
    ledger_totals: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """source name -> {"read": n, "trained": n, "held_out": n, <reason>: n}"""
    version: int = CURSOR_VERSION
    held_out_fraction: float = 0.0
    """Also of cursors from before there was any."""

    COUNTS = ("consumed_rows", "tokens_seen", "ledger_totals")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> Cursor:
        """Reads what `to_json` wrote; `where` names the file in errors.

        Raises:
            CheckpointError: not a cursor, or one of another version.
        """
        try:
            fields = json.loads(text)
            version = fields["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: not a data cursor ({error})") from error
        if version != CURSOR_VERSION:
            raise CheckpointError(
                f"{where}: data cursor of version {version}; this miles reads version {CURSOR_VERSION}"
            )
        try:
            return cls(**{**fields, "mixture": tuple(fields["mixture"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: not a data cursor ({error})") from error

    def require_same_data(self, other: Cursor, where: str) -> None:
        """Refuses to go on from `self` where `other` (made from today's flags) differs in what fixes the order.

        Raises:
            CheckpointError: names each setting that differs, with both values.
        """
        mine, theirs = asdict(self), asdict(other)
        differing = [
            f"{name}: the checkpoint has {mine[name]!r}, this run {theirs[name]!r}"
            for name in mine
            if name not in self.COUNTS and mine[name] != theirs[name]
        ]
        if differing:
            raise CheckpointError(
                f"{where} cannot be resumed with these settings, since the rows that follow would not be the "
                "ones that would have followed. Give the old values, or start anew with another --save.\n  "
                + "\n  ".join(differing)
            )


_REJECTS = pa.list_(
    pa.struct(
        [
            pa.field("row_id", pa.int64()),
            pa.field("source_id", pa.int32()),
            pa.field("reason", pa.string()),
            pa.field("detail", pa.string()),
            pa.field("position", pa.int32()),
        ]
    )
)

_STEP = [
    pa.field("step", pa.int64()),  # counting over epochs
    pa.field("epoch", pa.float64()),  # epochs consumed after the step
    pa.field("next_row", pa.int64()),
    pa.field("num_rows", pa.int32()),
]

RAW_STEP = pa.schema(
    [
        *_STEP,
        pa.field("row_ids", pa.list_(pa.int64())),
        pa.field("source_ids", pa.list_(pa.int32())),
        pa.field("payloads", pa.large_list(pa.large_binary())),  # each row as JSON text
        pa.field("read_seconds", pa.float64()),
    ]
)

ENCODED_STEP = pa.schema(
    [
        *_STEP,
        pa.field("fingerprint", pa.string()),
        pa.field("source_rows", pa.list_(pa.int64())),
        pa.field("sample_row_ids", pa.list_(pa.int64())),
        pa.field("sample_source_ids", pa.list_(pa.int32())),
        pa.field("sample_lengths", pa.list_(pa.int32())),
        pa.field("input_ids", pa.large_list(pa.int32())),  # samples end to end
        pa.field("loss_mask", pa.large_list(pa.uint8())),  # of tokens
        pa.field("num_straddling_tokens", pa.int32()),
        pa.field("source_truncated", pa.list_(pa.int64())),
        pa.field("source_held_out", pa.list_(pa.int64())),
        pa.field("rejects", _REJECTS),
        pa.field("read_seconds", pa.float64()),
        pa.field("normalize_seconds", pa.float64()),
        pa.field("encode_seconds", pa.float64()),
    ]
)

PACKED_STEP = pa.schema(
    [
        *_STEP,
        pa.field("fingerprint", pa.string()),
        pa.field("num_trained_tokens", pa.int64()),
        pa.field("num_straddling_tokens", pa.int32()),
        pa.field("source_truncated", pa.list_(pa.int64())),
        pa.field("source_held_out", pa.list_(pa.int64())),
        pa.field("source_rows", pa.list_(pa.int64())),
        pa.field("source_trained_tokens", pa.list_(pa.int64())),
        pa.field("pack_fill", pa.float64()),
        pa.field("dp_imbalance", pa.float64()),
        pa.field("dp_size", pa.int32()),
        pa.field(
            "micro_batch_segments", pa.list_(pa.int32())
        ),  # rank 0's micro-batches, rank 1's, …
        pa.field("segment_lengths", pa.list_(pa.int32())),  # in that order
        pa.field("segment_row_ids", pa.list_(pa.int64())),
        pa.field("segment_source_ids", pa.list_(pa.int32())),
        pa.field("input_ids", pa.large_list(pa.int32())),
        pa.field("loss_mask", pa.large_list(pa.uint8())),  # of tokens, not yet shifted
        pa.field("rejects", _REJECTS),
        pa.field("read_seconds", pa.float64()),
        pa.field("normalize_seconds", pa.float64()),
        pa.field("encode_seconds", pa.float64()),
        pa.field("pack_seconds", pa.float64()),
    ]
)

PREPARED_STEP = pa.schema(
    [
        *_STEP,
        pa.field("source_rows", pa.list_(pa.int64())),
        pa.field("source_truncated", pa.list_(pa.int64())),
        pa.field("sample_row_ids", pa.list_(pa.int64())),
        pa.field("sample_source_ids", pa.list_(pa.int32())),
        pa.field(
            "conversations", pa.large_list(pa.large_binary())
        ),  # JSON: messages, tools, trained
        pa.field("sample_lengths", pa.list_(pa.int32())),
        pa.field("sample_trained_tokens", pa.list_(pa.int32())),
        pa.field("rejects", _REJECTS),
    ]
)

STAGES = ("read", "normalize", "encode", "pack")
"""Whose seconds travel with a step."""
