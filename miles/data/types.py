"""The records that pass between the rooms: frozen dataclasses. `step_schemas` has the stream's tables.

`Encoded.loss_mask` marks *tokens* that are trained; `MicroBatch.loss_mask` marks *positions* whose
label (the next token of the segment) is trained. Only packing shifts from one to the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.common.counts import counted
from miles.data import cursor_differences
from miles.data.reasons import REASONS
from miles.errors import CheckpointError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

DUMMY_ROW_ID = -1
"""`row_ids` of a segment that only keeps a rank in step: its loss mask is all zero."""

REJECT_REASONS = tuple(REASONS)
"""Every reason for which a row can be dropped."""

STAGES = ("read", "normalize", "encode", "pack")
"""The stages of the loader. A step carries the seconds that each took."""

MAX_ROW_BYTES = 128 << 20
"""A row with more JSON text is dropped, as `too_long`: to decode it takes many times as much
memory, and a loader that dies of it would die again at the next try."""

MAX_ROW_VALUES = 16 << 20
"""A row with more commas and opening brackets is rejected: three bytes of it, such as `[],`, take
seventy bytes of memory."""

OVERSIZED_ROW = b"\xff oversized "
"""Stands for a row that is not read because it is larger; its size in bytes follows. It is no
UTF-8, so that no row that is read can look like it."""

UNREADABLE_ROW = b"\xff"
"""Stands for a row that cannot be made text, such as one with a string that is not UTF-8."""

OTHER_FIELDS_ROW = b"\xff fields "
"""Stands for a row of a CSV file that has other fields than its header; what was found follows, in
words. No row that is read can look like it."""

EXTRA = "extra"
"""Key of a turn, and of a message in Parquet: a JSON object of the keys that have no field of their
own."""


@dataclass(frozen=True)
class Conversation:
    """A row after normalizing: OpenAI messages and tools with a flag a turn, or plain text."""

    messages: tuple[Mapping[str, Any], ...]
    """`{"role", "content", ...}`; roles are system, user, assistant, tool. Empty for plain text."""
    tools: tuple[Mapping[str, Any], ...] | None
    flags: tuple[bool | None, ...]
    """[messages]: whether the row says that the message is trained; None: it says nothing"""
    text: str | None = None
    """a row that is no conversation: all of it is trained, without a chat template"""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """variables of the row for the chat template; they win over the run's own"""


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used, and the reason. It never holds the row's text."""

    row_id: int
    """position of the row in the manifest's order"""
    source_id: int
    reason: str
    """one of `REJECT_REASONS`"""
    detail: str
    position: int = 0
    """which of its step's rows it is, in the order of consumption; those that the stream leaves out
    (`StepRows.held_out`) are not counted"""


class RowRejected(Exception):
    """Raised by the pure stages for a row that cannot be used; becomes a `Reject`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REJECT_REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Encoded:
    """A sample: the token ids of one conversation, and which of them are trained."""

    input_ids: Int32
    """int32 [tokens]"""
    loss_mask: UInt8
    """uint8 [tokens]: 1 where the token is trained"""
    num_straddling_tokens: int = 0
    """tokens that begin before a trained span and end inside it; they are not trained"""
    is_truncated: bool = False
    """whether tokens at its end were cut off (`too_long="truncate_end"`)"""


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples end to end: what `Encoded` says of one, of many."""

    lengths: Int32
    """int32 [samples], in tokens"""
    input_ids: Int32
    """int32 [tokens]"""
    loss_mask: UInt8
    """uint8 [tokens]"""
    num_straddling_tokens: Int32
    """int32 [samples]"""
    is_truncated: Bool
    """bool [samples]"""


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """The result of encoding many rows: samples in the order of the rows, and rejects."""

    samples: Samples
    kept_rows: Int64
    """int64 [samples]: the number of each sample's row, ascending"""
    rejected: Mapping[int, RowRejected]
    """number of a row, ascending -> why it has no sample"""


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
class StepPosition:
    """The position of a step in the run."""

    index: int
    """0 for the first step of the run, counting over epochs"""
    epoch: float
    """epochs consumed once this step is trained"""
    next_row: int
    """`Cursor.consumed_rows` after this step: where a resume starts"""


@dataclass(frozen=True)
class KeyCount:
    """The rows of a source whose messages have a key of which nothing is made."""

    source_id: int
    key: str
    """as `unused_names.short_name` keeps it"""
    num_rows: int


@dataclass(frozen=True)
class StepRows:
    """The rows of a step by what became of them: its entry in the ledger."""

    read: tuple[int, ...]
    """[sources]: rows of the input, whether used, rejected or held out"""
    truncated: tuple[int, ...]
    """[sources]: samples that were cut at the end"""
    held_out: tuple[int, ...]
    """[sources]: rows that this stream leaves to the other one. The training stream leaves out the
    held-out rows, an evaluation stream all others (`DataConfig.held_out`)."""
    rejects: tuple[Reject, ...]
    unused_keys: tuple[KeyCount, ...] = ()
    """keys of messages that nothing reads, by source; of the rows that are not left out"""

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> StepRows:
        """Return the record of one row of a step table, given as plain values by column."""
        return cls(
            read=tuple(columns["source_rows"]),
            truncated=tuple(columns["source_truncated"]),
            held_out=tuple(columns["source_held_out"]),
            rejects=tuple(Reject(**reject) for reject in columns["rejects"]),
            unused_keys=tuple(KeyCount(**count) for count in columns["unused_keys"]),
        )

    @property
    def num_read(self) -> int:
        """Rows of the step: used, rejected or held out."""
        return sum(self.read)

    @property
    def num_held_out(self) -> int:
        """Rows of the step that this stream leaves to the other one."""
        return sum(self.held_out)


@dataclass(frozen=True)
class StepContent:
    """The samples of a step, over the whole global batch."""

    num_samples: int
    num_tokens: int
    num_causal_pairs: int
    """sum over samples of L (L + 1) / 2: pairs of a token and one that it attends to, itself
    included"""
    num_trained_tokens: int
    """positions whose label is trained"""
    source_trained_tokens: tuple[int, ...]
    """[sources]: the same, by source"""
    num_straddling_tokens: int
    fingerprint: str
    """xxh64 of ids and masks in sample order, hex"""


@dataclass(frozen=True)
class StepPacking:
    """The fill of a step's micro-batches."""

    fill: float
    """tokens / (micro-batches x capacity)"""
    imbalance: float
    """tokens of the fullest rank / mean over ranks"""


@dataclass(frozen=True)
class StepTiming:
    """The cost of making a step, and how long it was waited for."""

    stage_seconds: Mapping[str, float]
    """seconds of one loader process in each of `STAGES`"""
    queue_depth: int = 0
    """steps ready when this one was first asked for, before it was handed out; 0: the trainer
    waited"""
    wait_seconds: float = 0.0
    """how long the first rank that asked for this step waited"""


@dataclass(frozen=True)
class StepReport:
    """The facts of a step, beside its micro-batches."""

    position: StepPosition
    rows: StepRows
    content: StepContent
    packing: StepPacking
    timing: StepTiming


@dataclass(frozen=True, eq=False)
class Chunk:
    """The shards of a node's data ranks, of steps that travel together, not yet shifted.

    Step after step, and in a step the shards of `data_ranks` end to end.
    """

    reports: tuple[StepReport, ...]
    """one a step, without what is measured when it is handed out"""
    data_ranks: tuple[int, ...]
    """ascending"""
    step_micro_batches: Int32
    """int32 [steps]: of each of the data ranks"""
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


@dataclass(frozen=True, repr=False)
class Step:
    """One optimizer step's data: the report, and micro-batches for every data-parallel rank."""

    report: StepReport
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    """[dp_size][micro-batches a rank]: as many on every rank"""

    @property
    def index(self) -> int:
        """The number of the step: 0 for the first of the run, counting over epochs."""
        return self.report.position.index

    @property
    def epoch(self) -> float:
        """Epochs consumed once the step is trained."""
        return self.report.position.epoch

    @property
    def next_row(self) -> int:
        """The rows consumed after the step: where a resume starts."""
        return self.report.position.next_row

    @property
    def num_rows(self) -> int:
        """Rows of the input in the step: used, rejected or held out."""
        return self.report.rows.num_read

    @property
    def num_trained_tokens(self) -> int:
        """Positions whose label is trained, over the whole global batch."""
        return self.report.content.num_trained_tokens

    @property
    def fingerprint(self) -> str:
        """A hash of ids and masks in sample order, hex."""
        return self.report.content.fingerprint

    def __repr__(self) -> str:
        content = self.report.content
        num_batches = sum(map(len, self.micro_batches))
        return (
            f"Step {self.index:,}: {counted(self.num_rows, 'row')}, {content.num_tokens:,} tokens "
            f"({content.num_trained_tokens:,} trained), "
            f"{counted(num_batches, 'micro-batch', 'micro-batches')} on "
            f"{counted(len(self.micro_batches), 'rank')}"
        )


CURSOR_VERSION = 2


@dataclass(frozen=True)
class Cursor:
    """The position of a run in its data: JSON in each checkpoint.

    Every field but the counts must match to resume.
    """

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
    """0 also in cursors from before rows were held out"""
    unused_keys: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """source name -> key of messages that nothing reads -> rows; empty also in cursors from before
    keys were counted"""
    empty_answer: str | None = None
    """None in cursors from before it was a setting; it matches any"""

    COUNTS = ("consumed_rows", "tokens_seen", "ledger_totals", "unused_keys")

    def to_json(self) -> str:
        """Return the cursor as JSON."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> Cursor:
        """Return the cursor that `to_json` wrote.

        Args:
            text: JSON.
            where: names the file in errors.

        Raises:
            CheckpointError: it is not a cursor, or one of another version.
        """
        try:
            fields = json.loads(text)
            version = fields["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: not a data cursor ({error})") from error

        if version != CURSOR_VERSION:
            raise CheckpointError(
                f"{where}: data cursor of version {version}; this miles reads version "
                f"{CURSOR_VERSION}. Go on with the version of miles that wrote it"
            )

        try:
            cursor = cls(**{**fields, "mixture": tuple(fields["mixture"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: not a data cursor ({error})") from error
        for name in ("consumed_rows", "tokens_seen", "window_rows", "batch_size"):
            if type(getattr(cursor, name)) is not int:
                raise CheckpointError(
                    f"{where}: not a data cursor ({name} is {getattr(cursor, name)!r}, not a whole "
                    "number)"
                )
        return cursor

    def require_same_data(self, current: Cursor, where: str) -> None:
        """Refuse to resume from this cursor with settings under which other rows would follow.

        Args:
            current: made from the settings of this run.
            where: names the checkpoint in errors.

        Raises:
            CheckpointError: names the flag of each setting that differs, with both values.
        """
        saved, followed = asdict(self), asdict(current)
        for name in self.COUNTS:
            del saved[name], followed[name]
        unknown = [name for name, value in saved.items() if value is None]
        for name in unknown:
            del saved[name], followed[name]
        differences = cursor_differences.describe(saved, followed)
        if differences:
            raise CheckpointError(
                f"{where} cannot be resumed with these settings, since the rows that follow would "
                f"not be the ones that would have followed. {differences}"
            )
