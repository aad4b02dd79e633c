"""One row of a data set as a notebook sees it: what was read, what became of it, and why.

ds[12]            Row 12: 45 tokens, 12 trained (chat row 12)
ds[13]            Row 13: dropped, unknown_role (chat row 13)
ds[13].raw        {"messages": [{"role": "npc", "content": "Hello"}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from miles.common.counts import counted
from miles.data.reasons import REASONS
from miles.data.types import Conversation, Encoded, Int32, UInt8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN = 2_000
"""Characters of a dropped row that are shown."""


@dataclass(frozen=True, eq=False, repr=False)
class Row:
    """A row, and the sample that it becomes or the reason why it becomes none."""

    row_id: int
    """its place in the data set, from 0"""
    source: str
    file: str
    file_row: int
    """its place in the file, from 0"""
    raw: Any
    """the row as it was read, mostly a dict; a text where it is no JSON"""
    conversation: Conversation | None
    encoded: Encoded | None
    reason: str | None
    """why it is dropped, one of `REASONS`; None: it is not"""
    detail: str
    tokenizer: PreTrainedTokenizerBase
    is_of_one_file: bool = False
    """the data set has no other file"""
    say: Callable[[str], str] = field(default=str)
    """has a remedy speak of Python's arguments"""

    @property
    def messages(self) -> list[Mapping[str, Any]] | None:
        """OpenAI messages; None where the row has none that are understood."""
        return None if self.conversation is None else list(self.conversation.messages)

    @property
    def text(self) -> str | None:
        """The text of a row that is no conversation."""
        return None if self.conversation is None else self.conversation.text

    @property
    def tools(self) -> list[Mapping[str, Any]] | None:
        """The tools of the conversation, if it has any."""
        tools = None if self.conversation is None else self.conversation.tools
        return None if tools is None else list(tools)

    @property
    def input_ids(self) -> Int32 | None:
        """int32 [tokens]; None where the row is dropped."""
        return None if self.encoded is None else self.encoded.input_ids

    @property
    def loss_mask(self) -> UInt8 | None:
        """uint8 [tokens]: 1 where the token is trained; None where the row is dropped."""
        return None if self.encoded is None else self.encoded.loss_mask

    @property
    def num_tokens(self) -> int:
        """0 where the row is dropped."""
        return 0 if self.encoded is None else len(self.encoded.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """0 where the row is dropped."""
        return 0 if self.encoded is None else int(self.encoded.loss_mask.sum())

    @property
    def remedy(self) -> str:
        """Return what to do about a dropped row; "" where the row is not dropped."""
        return "" if self.reason is None else self.say(REASONS[self.reason].remedy)

    @property
    def place(self) -> str:
        """`chat row 12`, or of a set of several files `chat, a.jsonl row 12`"""
        file = "" if self.is_of_one_file else f", {self.file.rsplit('/', 1)[-1]}"
        return f"{self.source}{file} row {self.file_row:,}"

    def outcome(self) -> str:
        """Return what became of it: `45 tokens, 12 trained`, or `dropped, unknown_role`."""
        if self.encoded is None:
            return f"dropped, {self.reason}"
        cut = ", cut at the end" if self.encoded.is_truncated else ""
        return f"{counted(self.num_tokens, 'token')}, {self.num_trained_tokens:,} trained{cut}"

    def raw_text(self) -> str:
        """Return the beginning of what was read, as indented JSON."""
        text = self.raw
        if not isinstance(text, str):
            text = json.dumps(self.raw, ensure_ascii=False, indent=2)
        num_more = len(text) - MAX_SHOWN
        return text if num_more <= 0 else f"{text[:MAX_SHOWN]}… ({num_more:,} characters more)"

    def to_text(self, columns: int = 100) -> str:
        """Return the row as text: trained tokens in brackets, or why it is dropped."""
        from miles.data.notebook.preview import Preview

        return Preview([self]).to_text(columns)

    def __repr__(self) -> str:
        return f"Row {self.row_id:,}: {self.outcome()} ({self.place})"

    def _repr_html_(self) -> str:
        from miles.data.notebook.preview import Preview

        return Preview([self])._repr_html_()


def raw_of(payload: bytes) -> Any:
    """Return what a row's bytes are: JSON, or else text."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return payload.decode("utf-8", "replace")
