"""The card of a data set, as text and as HTML: rows, tokens, lengths, what is dropped or not used.

numbers of the rows that were encoded  ->  lines (label, value)  ->  a table, or a box of HTML
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles.common.counts import counted
from miles.common.facts import Facts
from miles.common.screen import printable
from miles.data.files.manifest import Manifest, ManifestSource
from miles.data.files.row_shapes import MAIN_FIELDS
from miles.data.notebook.preview import as_text
from miles.data.stream import account
from miles.data.types import Int64

UNKNOWN_ROLE = "unknown_role"
_ROLE = re.compile(r'its role ("(?:[^"\\]|\\.)*") is not known')

NUM_BARS = 40
"""Bars of the chart of lengths."""

# Translucent greys and one green over the page's own colours: for light and dark themes.
_BOX_CSS = (
    "font:14px/1.5 system-ui,sans-serif;display:inline-block;box-sizing:border-box;"
    "min-width:min(34em,100%);max-width:100%;"
    "border:1px solid rgba(128,128,128,.35);border-radius:8px;padding:12px 18px 14px"
)
_TITLE_CSS = "font-weight:600;font-size:16px"
_BASIS_CSS = "float:right;opacity:.6;font-size:12px;line-height:24px"
# A notebook divides a table into columns of one width, unless the table asks for its own.
_TABLE_CSS = "table-layout:auto;border-collapse:collapse;width:100%;margin:6px 0 0;font-size:14px"
# JupyterLab's tables are laid out by the widths of their first row, and striped.
_ROW_CSS = "background:transparent"
_LABEL_CSS = (
    "text-align:left;vertical-align:top;white-space:nowrap;opacity:.6;padding:2px 18px 2px 0;"
    "width:8em"
)
_VALUE_CSS = "text-align:left;padding:2px 0;white-space:normal;overflow-wrap:anywhere"
_TRACK_CSS = (
    "height:6px;border-radius:3px;background:rgba(128,128,128,.25);margin:4px 0 3px;overflow:hidden"
)
_TRAINED_COLOUR = "rgba(46,160,67,.85)"
CHART_PIXELS = 44
"""Height of the chart."""
_CHART_CSS = (
    f"height:{CHART_PIXELS}px;margin-top:5px;white-space:nowrap;line-height:{CHART_PIXELS}px"
)
_BAR_CSS = (
    f"display:inline-block;vertical-align:bottom;width:{90 / NUM_BARS:.2f}%;"
    f"margin-right:{10 / NUM_BARS:.2f}%;background:rgba(128,128,128,.55)"
)


@dataclass(frozen=True)
class Summary:
    """Numbers of a data set, of all its rows or of a sample."""

    num_rows: int
    """rows that were encoded or rejected"""
    lengths: Int64
    """int64 [usable rows]: tokens of each"""
    num_trained_tokens: int
    reasons: Mapping[str, int]
    """reason -> rows that were rejected for it"""
    unused_keys: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """source name -> key of messages that nothing reads -> rows that have it"""
    unknown_roles: Mapping[str, int] = field(default_factory=dict)
    """name of a role that is not known -> rows that were dropped for it"""

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def trained_share(self) -> float:
        return self.num_trained_tokens / max(self.num_tokens, 1)


@dataclass(frozen=True)
class Card:
    """A data set at a glance."""

    manifest: Manifest
    summary: Summary
    is_sample: bool
    """the summary is of some rows only; token numbers are scaled up to all of them"""
    say: Callable[[str], str] = str
    """has a remedy speak of flags, or of Python's arguments"""

    def lines(self) -> list[tuple[str, str]]:
        """Return the label and the value of each line."""
        return [
            ("rows", self._rows()),
            ("sources", ", ".join(_with_shape(source) for source in self.manifest.sources)),
            ("tokens", self._tokens()),
            ("trained", f"{self.summary.trained_share:.1%} of the tokens"),
            ("row length", self._lengths()),
            ("dropped", self._dropped()),
            *(("", self.say(remedy)) for remedy in self._remedies()),
            *account.lines(self._not_used()),
            ("numbers", self._basis()),
        ]

    def to_text(self, columns: int = 100) -> str:
        """Return the card as a table of at most so many columns."""
        return as_text(Facts(self.lines(), indent=0), columns)

    def to_html(self) -> str:
        """Return a self-contained HTML fragment: inline styles, no scripts, all text escaped."""
        charts = {
            "trained": _share_bar(self.summary.trained_share),
            "row length": _histogram(self.summary.lengths),
        }

        rows = ""
        for label, value in self.lines():
            if label != "numbers":  # stands in the corner
                cell = html.escape(printable(value)) + charts.get(label, "")
                rows += f'<tr style="{_ROW_CSS}"><td style="{_LABEL_CSS}">{label}</td>'
                rows += f'<td style="{_VALUE_CSS}">{cell}</td></tr>'

        title = html.escape(printable(", ".join(self.manifest.source_names)))
        return (
            f'<div style="{_BOX_CSS}">'
            f'<span style="{_BASIS_CSS}">{html.escape(self._basis())}</span>'
            f'<span style="{_TITLE_CSS}">{title}</span>'
            f'<table style="{_TABLE_CSS}">{rows}</table></div>'
        )

    def _rows(self) -> str:
        num_files = sum(len(source.files) for source in self.manifest.sources)
        files = counted(num_files, "file")
        return f"{self.manifest.num_rows:,} in {files}"

    def _tokens(self) -> str:
        tokens = self.summary.num_tokens
        num_rows = self.manifest.num_rows
        total = f"{tokens:,}"
        if num_rows != self.summary.num_rows:
            total = f"about {round(tokens * num_rows / self.summary.num_rows, -3):,.0f}"
        return f"{total} ({tokens / max(len(self.summary.lengths), 1):.0f} a row)"

    def _lengths(self) -> str:
        lengths = self.summary.lengths if len(self.summary.lengths) else [0]
        quantiles = [f"{length:,}" for length in np.percentile(lengths, [50, 90, 99]).astype(int)]
        median, percentile_90, percentile_99 = quantiles
        return f"median {median}, 90th percentile {percentile_90}, 99th {percentile_99} tokens"

    def _dropped(self) -> str:
        reasons = account.reasons_of(self.summary.reasons).items()
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons) or "none"
        return f"{counts} of {counted(self.summary.num_rows, 'row')}"

    def _remedies(self) -> list[str]:
        """Return what to do about dropped rows; of unknown roles it names those that there are."""
        remedies = []
        for remedy in account.remedies(self.summary.reasons):
            roles = self.summary.unknown_roles
            if remedy.startswith(f"{UNKNOWN_ROLE}:") and roles:
                names = account.some(
                    [f"{name} ({counted(count, 'row')})" for name, count in roles.items()]
                )
                meaning = json.dumps(dict.fromkeys(list(roles)[:3], "user"), ensure_ascii=False)
                remedy = (
                    f"{UNKNOWN_ROLE}: {names}; say what each name means (system, user, assistant, "
                    f"tool) with --role-names {shlex.quote(meaning)}"
                )
            remedies.append(remedy)
        return remedies

    def _not_used(self) -> dict[str, dict[str, Any]]:
        keys = self.summary.unused_keys
        sources = self.manifest.sources
        return {
            source.name: account.not_used(source, keys.get(source.name, {})) for source in sources
        }

    def _basis(self) -> str:
        if self.is_sample:
            return f"from a sample of {counted(self.summary.num_rows, 'row')}"
        return "every row read"


def unknown_roles(details: Iterable[str]) -> dict[str, int]:
    """Return the names of roles that are not known, and how many rows were dropped for each.

    Args:
        details: of the rows that were dropped for `UNKNOWN_ROLE`.
    """
    counts = Counter[str]()
    for detail in details:
        if found := _ROLE.search(detail):
            counts[json.loads(found[1])] += 1
    return dict(counts.most_common())


def _share_bar(share: float) -> str:
    return (
        f'<div style="{_TRACK_CSS}"><div style="height:100%;width:{share:.1%};'
        f'background:{_TRAINED_COLOUR}"></div></div>'
    )


def _histogram(lengths: Int64) -> str:
    """Return a bar chart of the rows' lengths, from 0 to the longest."""
    if not len(lengths):
        return ""
    longest = int(np.max(lengths))
    counts = np.histogram(lengths, bins=NUM_BARS, range=(0, longest))[0]
    bars = "".join(_bar(float(count)) for count in counts / counts.max())
    words = f"rows by length, 0 to {longest:,} tokens"
    return f'<div style="{_CHART_CSS}" role="img" aria-label="{words}" title="{words}">{bars}</div>'


def _bar(height: float) -> str:
    """Draw a bar of a height of at most 1; the smallest ones above 0 stay visible.

    It is no SVG: a notebook that is opened again, or shown by GitHub, has those taken out.
    """
    pixels = max(round(height * CHART_PIXELS), 1) if height else 0
    return f'<span style="{_BAR_CSS};height:{pixels}px"></span>'


def _with_shape(source: ManifestSource) -> str:
    """Return a source with its row shape: `openhermes (messages in conversations)`."""
    shape = source.format.shape.replace("_", " and ")
    fields = MAIN_FIELDS[source.format.shape]
    columns = ", ".join(source.columns[field] for field in fields if field in source.columns)
    return f"{source.name} ({shape} in {columns})" if columns else f"{source.name} ({shape})"
