"""Rules that the tests themselves keep."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_table import FAULTS, PAGE, page, rows_of_page
from tests.support.heavy import is_heavy, part_of_light_files

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


def test_parts_hold_every_light_file_once() -> None:
    files = {file for file in TESTS.rglob("test_*.py") if not is_heavy(file)}
    parts = [part_of_light_files(part, 3) for part in (1, 2, 3)]
    assert sum(map(len, parts)) == len(files)
    assert frozenset.union(*parts) == files


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
