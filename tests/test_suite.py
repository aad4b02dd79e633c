"""Rules that the tests themselves keep."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_table import FAULTS, PAGE, page, rows_of_page
from tests.support.heavy import SECONDS, is_heavy, part_of_files

TESTS = Path(__file__).parent


def imported_modules(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, and what it imports from them, with dots."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_test_module(module: str) -> bool:
    """Return whether a module holds tests or their fixtures."""
    parts = module.split(".")
    return parts[0] == "tests" and any(
        part.startswith("test_") or part == "conftest" for part in parts
    )


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_test_imports_another(folder: str) -> None:
    """Builders that two tests share lie in tests/support."""
    for file in sorted((TESTS.parent / folder).rglob("*.py")):
        borrowed = [module for module in imported_modules(file) if is_test_module(module)]
        assert not borrowed, f"{file.relative_to(TESTS.parent)} imports {borrowed[0]}"


@pytest.mark.parametrize("heavy", [False, True], ids=["light", "heavy"])
def test_parts_hold_every_file_once(heavy: bool) -> None:
    files = {file for file in TESTS.rglob("test_*.py") if is_heavy(file) == heavy}
    parts = [part_of_files(part, 3, heavy=heavy) for part in (1, 2, 3)]
    assert all(parts)
    assert sum(map(len, parts)) == len(files)
    assert frozenset.union(*parts) == files


def test_files_with_much_to_do_are_known_and_parted() -> None:
    """Those that are compared with one run are in one part: another part would need its own run."""
    for name in SECONDS:
        assert is_heavy(TESTS / name), f"{name} is no heavy file"
    parts = [part_of_files(part, 2, heavy=True) for part in (1, 2)]
    of_one_run = {TESTS / "integration" / name for name in ("test_chaos.py", "test_survival.py")}
    assert any(of_one_run <= part for part in parts)
    loads = [sum(SECONDS.get(str(file.relative_to(TESTS)), 0) for file in part) for part in parts]
    assert max(loads) < 0.6 * sum(loads)


def test_heavy_files_are_known() -> None:
    assert is_heavy(TESTS / "integration/test_new.py")
    assert is_heavy(TESTS / "train/rank/test_trainer.py")
    assert not is_heavy(TESTS / "data/order/test_plan.py")
    assert not is_heavy(TESTS / "conftest.py")


def test_every_fault_of_the_page_is_injected_by_a_test() -> None:
    texts = set[str]()
    for file in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)

    rows = rows_of_page()
    assert not set(FAULTS) - texts, "no test has them"
    assert rows.keys() == set(FAULTS), "MILES_WRITE_DOCS=1 pytest TEST writes the missing rows"
    assert PAGE.read_text(encoding="utf-8") == page(rows)
