"""The result of `miles.train.run`: where the run is, how far it came, and its losses.

metrics.jsonl and the newest checkpoint of the run's folder -> TrainedRun -> a line, or a picture
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.common import checkpoint_folder, own_files, run_folder, storage
from miles.common.counts import counted
from miles.train.config import TrainConfig
from miles.train.export_target import is_exported, target_of

if TYPE_CHECKING:
    from miles.train.driver.run import RunSummary

_WIDTH, _HEIGHT, _MARGIN = 480.0, 120.0, 4.0
_MAX_POINTS = 480
"""The limit of the curve: no more than it has pixels."""

# Translucent greys and one blue over the page's own colours: for light and dark themes.
_BOX_CSS = (
    "font:14px/1.5 system-ui,sans-serif;display:inline-block;box-sizing:border-box;"
    "min-width:min(34em,100%);max-width:100%;"
    "border:1px solid rgba(128,128,128,.35);border-radius:8px;padding:12px 18px 14px"
)
_TITLE_CSS = "font-weight:600;font-size:16px"
_NOTE_CSS = "opacity:.6"
_CURVE_COLOUR = "rgba(59,130,246,.95)"
_GRID_COLOUR = "rgba(128,128,128,.35)"


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """A run after `miles.train.run`. In a notebook it is shown with the curve of its loss."""

    folder: str
    """the run folder: metrics.jsonl, config.json, ledger.json, first_batch.json"""
    checkpoint: str
    """folder of the newest checkpoint"""
    num_steps: int
    """trained since the beginning of the run"""
    losses: tuple[float, ...]
    """of each of these steps; NaN where it was not finite"""
    tokens_seen: int
    """trained tokens since the beginning of the run"""
    export: str | None
    """folder of the trained weights in Hugging Face's format (`save_hf`)"""
    stopped_by: str | None
    """the signal, such as "Ctrl-C", that stopped it; the same call goes on"""

    @classmethod
    def of(cls, config: TrainConfig, summary: RunSummary | None) -> TrainedRun:
        """Return what a run's folder says.

        Args:
            summary: of the last attempt; None: it was finished before.

        Raises:
            BrokenFileError: no line of metrics.jsonl can be read.
        """
        path = storage.join(config.run_dir, run_folder.METRICS)
        steps = own_files.read_records(path, [("step", "sft/loss", "sft/tokens_seen")]).objects
        losses = [math.nan if step["sft/loss"] is None else step["sft/loss"] for step in steps]

        saved = checkpoint_folder.find(config.save)
        num_saved = saved.iteration if saved is not None else 0
        is_adapter = config.lora.is_on
        has_export = bool(num_saved) and is_exported(
            config.save_hf, num_saved, is_adapter=is_adapter
        )
        return cls(
            config.run_dir,
            saved.url if saved is not None else "",
            len(losses),
            tuple(losses),
            steps[-1]["sft/tokens_seen"] if steps else 0,
            target_of(config.save_hf, num_saved) if config.save_hf and has_export else None,
            None if summary is None or summary.is_finished else summary.stopped_by or "a signal",
        )

    @property
    def last_step(self) -> int:
        """Return the number of the last step, counted from 0; -1 before the first."""
        return self.num_steps - 1

    @property
    def is_finished(self) -> bool:
        """Return whether no step is left."""
        return self.stopped_by is None

    @property
    def report(self) -> str:
        """Return the path of the report page, which `miles.report.write_report` makes."""
        return storage.join(self.folder, run_folder.REPORT)

    @property
    def report_call(self) -> str:
        """Return the line that writes the report page."""
        return f"miles.report.write_report({self.folder!r})"

    def __repr__(self) -> str:
        return f"<run {self.folder}: {self._numbers()}>"

    def _numbers(self) -> str:
        state = "finished" if self.is_finished else f"stopped by {self.stopped_by}"
        parts = [counted(self.num_steps, "step"), state]
        if self.losses:
            parts.append(f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}")
            parts.append(counted(self.tokens_seen, "trained token"))
        return ", ".join(parts)

    def _repr_html_(self) -> str:
        """Return a box with the numbers, the curve of the loss, and where all of it is."""
        places = [("checkpoint", self.checkpoint)]
        if self.export is not None:
            places.append(("Hugging Face", self.export))
        if storage.exists(self.report):
            places.append(("report", self.report))
        else:
            places.append(("report", f"none yet; {self.report_call} writes {run_folder.REPORT}"))
        lines = "".join(
            f'<div><span style="{_NOTE_CSS}">{label}</span> {html.escape(text)}</div>'
            for label, text in places
        )
        return (
            f'<div style="{_BOX_CSS}"><div style="{_TITLE_CSS}">{html.escape(self.folder)}</div>'
            f"<div>{html.escape(self._numbers())}</div>{curve(self.losses)}{lines}</div>"
        )


def curve(losses: Sequence[float]) -> str:
    """Return a loss over its steps as SVG; gaps where it is not finite, nothing below two steps."""
    stride = max(1, math.ceil(len(losses) / _MAX_POINTS))
    picked = [(step, losses[step]) for step in range(0, len(losses), stride)]
    finite = [loss for _, loss in picked if math.isfinite(loss)]
    if len(picked) < 2 or not finite:
        return ""
    top = max(finite) or 1.0

    pieces: list[list[str]] = [[]]
    for step, loss in picked:
        if not math.isfinite(loss):
            pieces.append([])
            continue
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / (len(losses) - 1)
        y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * loss / top
        pieces[-1].append(f"{x:.1f},{y:.1f}")
    lines = "".join(
        f'<polyline points="{" ".join(piece)}" fill="none" stroke="{_CURVE_COLOUR}" '
        'stroke-width="1.5" stroke-linejoin="round"/>'
        for piece in pieces
        if piece
    )
    floor = f"{_HEIGHT - _MARGIN:.0f}"
    label = f"loss from {losses[0]:.3f} to {losses[-1]:.3f} over {counted(len(losses), 'step')}"
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{label}" '
        'style="display:block;width:100%;max-width:40em;margin:6px 0">'
        f'<line x1="0" y1="{floor}" x2="{_WIDTH:.0f}" y2="{floor}" stroke="{_GRID_COLOUR}"/>'
        f"{lines}</svg>"
    )
