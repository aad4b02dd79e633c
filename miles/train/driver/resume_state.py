"""`miles.json` of a checkpoint: the state to resume from beside the weights and the optimizer.

All of it is of the moment at which the checkpoint was begun.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from miles.common import storage
from miles.common.checkpoint_folder import CHAT_TEMPLATE, EXTRA, PRECISION, other_ways
from miles.data.types import Cursor
from miles.errors import CheckpointError
from miles.train.precision import Precision
from miles.train.types import StartPoint


@dataclass(frozen=True)
class ResumeState:
    """The state of a run beside its weights and its optimizer."""

    cursor: Cursor | None = None
    """position in the data; None: its beginning"""
    num_metrics_lines: int = 0
    """lines of metrics.jsonl"""
    num_skipped_steps: int = 0
    eval_loss: float | None = None
    """None: it was not evaluated, or the loss was not finite"""
    chat_template: str | None = None
    """that of `--chat-template-path`, for an export; None: the tokenizer's own"""
    precision: Precision | None = None
    """the format that the run computes in, for `StartPoint.trained_in`; None: not known"""
    unwritten_metrics: tuple[str, ...] = ()
    """the last of the lines, those that metrics.jsonl could not take"""

    @classmethod
    def of(cls, start: StartPoint) -> ResumeState:
        """Return the state that an attempt continues from; that of a new run if it does not resume.

        Raises:
            CheckpointError: a cursor that cannot be read.
        """
        if not start.is_resume or start.checkpoint.extra is None:
            return cls()
        content = start.checkpoint.extra
        return cls(
            start.cursor(),
            _count(start, "metrics_lines"),
            _count(start, "skipped_steps"),
            content.get("eval_loss"),
            content.get(CHAT_TEMPLATE),
            Precision.named(content.get(PRECISION)),
            _lines(start, "unwritten_metrics"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `miles.json`."""
        assert self.cursor is not None, "a checkpoint has a position in the data"
        is_comparable = self.eval_loss is not None and math.isfinite(self.eval_loss)
        content = {
            "cursor": json.loads(self.cursor.to_json()),
            "metrics_lines": self.num_metrics_lines,
            "skipped_steps": self.num_skipped_steps,
            "eval_loss": self.eval_loss if is_comparable else None,
        }
        if self.chat_template is not None:
            content[CHAT_TEMPLATE] = self.chat_template
        if self.precision is not None:
            content[PRECISION] = self.precision.value
        if self.unwritten_metrics:
            content["unwritten_metrics"] = list(self.unwritten_metrics)
        return content


def _lines(start: StartPoint, name: str) -> tuple[str, ...]:
    """Return some lines of `miles.json`; none where it has none.

    Raises:
        CheckpointError: it has something else there.
    """
    lines = (start.checkpoint.extra or {}).get(name, [])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise CheckpointError(
            f"{storage.join(start.url, EXTRA)}: {name} is not a list of lines. "
            f"{other_ways(start.url)}"
        )
    return tuple(lines)


def _count(start: StartPoint, name: str) -> int:
    """Return a whole number of `miles.json`, or 0 where an older version has not written it.

    Raises:
        CheckpointError: it is something else.
    """
    count = (start.checkpoint.extra or {}).get(name, 0)
    if type(count) is not int or count < 0:
        raise CheckpointError(
            f"{storage.join(start.url, EXTRA)}: {name} is {count!r}, not a whole number. "
            f"{other_ways(start.url)}"
        )
    return count
