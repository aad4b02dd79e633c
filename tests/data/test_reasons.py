"""The reasons to drop a row: docs/rows.md has the words of the code."""

from __future__ import annotations

import re

from miles.data.reasons import REASONS
from miles.data.types import REJECT_REASONS
from tests.support.processes import PROJECT

ROWS_PAGE = PROJECT / "docs/rows.md"
_CODE = re.compile(
    r"""--[a-z-]+(?: '[^']*'| (?:train|escape|reject|truncate_end)\b)?|miles certify"""
)


def test_the_table_of_reasons_has_the_words_of_the_code() -> None:
    """If it fails, the lines that it prints belong into the table of the page."""
    lines = []
    for name, reason in REASONS.items():
        remedy = _CODE.sub(lambda found: f"`{found[0]}`", reason.remedy)
        lines.append(f"| `{name}` | {reason.meaning} | {remedy} |")
    table = "\n".join(lines)
    print(table)
    assert f"\n|---|---|---|\n{table}\n\n" in ROWS_PAGE.read_text(encoding="utf-8")


def test_every_reason_is_in_the_table() -> None:
    assert tuple(REASONS) == REJECT_REASONS
