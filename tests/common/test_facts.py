"""Labels and texts on screens of any width: words, paths and columns stay whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from miles.common.facts import Facts
from miles.train.estimate.dry_run import _memory_table
from miles.train.estimate.memory import StageMemory

PATH = "/data/models/a-long-name-of-a-folder/and-another/rows.parquet"
FACTS = [
    ("rows", f"16,418 rows in 1 file [v2] ({PATH})"),
    ("order", Text.assemble("shuffled", (" by --rollout-seed", "red"))),
]


def printed(what: object, columns: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=columns, color_system=None).print(what, soft_wrap=True)
    return screen.getvalue().splitlines()


def test_a_text_stands_beside_its_label() -> None:
    assert printed(Facts(FACTS, "Data"), 60) == [
        "Data",
        "  rows     16,418 rows in 1 file [v2]",
        f"           ({PATH})",
        "  order    shuffled by --rollout-seed",
    ]


def test_a_narrow_screen_has_it_below() -> None:
    assert printed(Facts(FACTS, indent=0), 36) == [
        "rows",
        "    16,418 rows in 1 file [v2]",
        f"    ({PATH})",
        "order",
        "    shuffled by --rollout-seed",
    ]


@pytest.mark.parametrize("columns", [10_000, 80, 60, 40, 30])
def test_the_numbers_of_memory_are_never_cut(columns: int) -> None:
    gib = 2**30
    stages = [StageMemory(0, 4, 20_202_880, 20_202_880, gib, 2 * gib, 5 * gib, gib // 2, gib)]
    lines = printed(_memory_table(stages, columns), columns)
    text = "\n".join(lines)
    for word in ("stage", "parameters", "20,202,880", "optimizer", "5.00", "total", "9.50"):
        assert word in text
    assert max(map(len, lines)) <= columns
    assert len(lines) == (2 if columns >= 80 else 9)
