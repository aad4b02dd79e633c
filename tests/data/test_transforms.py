"""The user's function by name and by value: how it is found, travels, and is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle as cloudpickle

from miles.common.flags import build
from miles.data.config import RowFormat
from miles.data.transforms import Transform
from miles.errors import ConfigError

pytestmark = pytest.mark.heavy

CODE = "def to_row(row):\n    return {'text': row['a']}\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module in the working folder, where people have theirs; it is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "rows_of_a_test.py"
    file.write_text(CODE)
    yield file
    sys.modules.pop(file.stem, None)


NAME = "rows_of_a_test:to_row"


def test_a_name_is_imported_from_the_working_folder(module: Path) -> None:
    transform = Transform.of(NAME)
    assert transform.function({"a": "x"}) == {"text": "x"}
    assert str(transform) == f"{NAME} (code {transform.code})"


def test_a_function_and_its_name_are_the_same(module: Path) -> None:
    named = Transform.of(NAME)
    assert Transform.of(sys.modules["rows_of_a_test"].to_row) == named
    assert build(RowFormat, {"--transform": NAME}) == RowFormat(transform=named)
    assert RowFormat() == RowFormat(transform=None)


def test_by_name_no_code_travels(module: Path) -> None:
    sent = cloudpickle.dumps(Transform.of(NAME))
    assert b"rows_of_a_test:to_row" in sent
    assert b"text" not in sent

    del sys.modules["rows_of_a_test"]
    assert cloudpickle.loads(sent).function({"a": "x"}) == {"text": "x"}


def test_a_function_without_a_name_travels_by_value() -> None:
    suffix = "."
    arrived = cloudpickle.loads(cloudpickle.dumps(Transform.of(lambda row: row["a"] + suffix)))
    assert arrived.function({"a": "x"}) == "x."


def test_changed_code_is_refused_where_it_arrives(module: Path) -> None:
    sent = cloudpickle.dumps(Transform.of(NAME))
    module.write_text(CODE.replace("'a'", "'b'"))
    del sys.modules["rows_of_a_test"]
    with pytest.raises(ConfigError, match=r"its code in .*rows_of_a_test\.py is not that"):
        cloudpickle.loads(sent).function  # noqa: B018


def test_a_process_that_has_old_code_takes_the_new(module: Path) -> None:
    Transform.of(NAME)
    old = sys.modules["rows_of_a_test"]
    module.write_text("# longer\n" + CODE.replace("'a'", "'b'"))
    del sys.modules["rows_of_a_test"]
    sent = cloudpickle.dumps(Transform.of(NAME))
    sys.modules["rows_of_a_test"] = old  # as a loader that lives on has it
    assert cloudpickle.loads(sent).function({"b": "x"}) == {"text": "x"}


def test_json_has_the_name_and_the_hash_alone(module: Path) -> None:
    transform = Transform.of(NAME)
    content = transform.to_json()
    assert content == {"name": NAME, "code": transform.code}
    del sys.modules["rows_of_a_test"]
    assert Transform.from_json(content) == transform
    assert "rows_of_a_test" not in sys.modules


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("rows_of_a_test", "takes package.module:function"),
        ("rows_of_a_test:", "takes package.module:function"),
        ("rows_of_a_test:to_rows", "has no to_rows; did you mean to_row"),
        ("no_such_module_here:f", "there is no module no_such_module_here, neither in"),
        ("os:sep", "is no function"),
        ("rows_of_a_test:Kind", "is no function"),
        (5, "must be a function or the name of one, not 5"),
        (dict, "must be a function or the name of one"),
    ],
)
def test_what_is_no_function_is_refused(module: Path, value: Any, message: str) -> None:
    module.write_text(CODE + "class Kind: pass\n")
    with pytest.raises(ConfigError, match=message):
        RowFormat(transform=value)


def test_a_module_that_cannot_be_imported_says_why(module: Path) -> None:
    module.write_text("import no_such_library\n")
    with pytest.raises(ConfigError, match="imports no_such_library, which is not installed"):
        Transform.of(NAME)
    module.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(
        ConfigError, match=r"ZeroDivisionError: division by zero \(line 2 of .*rows_of"
    ):
        Transform.of(NAME)


def test_a_function_over_a_handle_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w") as handle, pytest.raises(ConfigError, match="handle, which"):
        Transform.of(lambda row: handle)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; sys.exit(3)", r"cannot be imported: SystemExit: 3 \(line 1 of "),
        ("def f(:", r"cannot be imported: SyntaxError: .* line 1\)$"),
    ],
)
def test_a_module_that_ends_its_import_is_refused(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rows.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        Transform.of("broken_rows:f")


def test_a_file_in_place_of_a_module_is_named() -> None:
    with pytest.raises(ConfigError, match=r"has no \.py, and dots for slashes: my\.rows:f$"):
        Transform.of("./my/rows.py:f")
