"""A function's hash: the same for the same code wherever it stands, another for any other code."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from miles.common.code_hash import NoHashError, code_hash

PLAIN = """
import re, json, enum
from dataclasses import dataclass, field
SUFFIX = "."
WORD = re.compile("a+")
class Kind(enum.Enum):
    ONE = 1
class Cleaner:
    end = SUFFIX
    def clean(self, text): return text.strip()
@dataclass(frozen=True)
class Limits:
    most: int = 7
    words: list[str] = field(default_factory=list)
LIMITS = Limits()
def helper(text): return Cleaner().clean(text) + SUFFIX
def to_row(row, most=3, *, least=1):
    parts = [part for part in row["parts"] if part in {"a", "b", "c"}]
    assert len(parts) < LIMITS.most
    return {"text": helper(row["q"]), "kind": Kind.ONE.name, "word": WORD.sub("", json.dumps(parts))}
"""


def function_of(source: str, name: str = "to_row", module: str = "some_rows") -> Any:
    """Run source as a module, and return a function of it."""
    made = types.ModuleType(module)
    sys.modules[module] = made  # a dataclass looks for its module
    exec(compile(source, f"{module}.py", "exec", dont_inherit=True), made.__dict__)  # noqa: S102
    del sys.modules[module]
    return made.__dict__[name]


def test_it_does_not_follow_lines_comments_names_and_files() -> None:
    moved = "\n\n# a comment\n" + PLAIN.replace("    parts =", "    # another\n    parts =")
    renamed = PLAIN.replace("def to_row", "def other")
    assert code_hash(function_of(moved)) == code_hash(function_of(PLAIN))
    assert code_hash(function_of(renamed, "other", "elsewhere")) == code_hash(function_of(PLAIN))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('SUFFIX = "."', 'SUFFIX = "!"'),
        ('"a+"', '"b+"'),
        ('re.compile("a+")', 're.compile("a+", re.I)'),
        ("text.strip()", "text.lstrip()"),
        ("Kind.ONE.name", "Kind.ONE.value"),
        ("ONE = 1", "ONE = 2"),
        ("most: int = 7", "most: int = 8"),
        ("default_factory=list", "default_factory=dict"),
        ("Limits()", "Limits(9)"),
        ("most=3", "most=4"),
        ("least=1", "least=2"),
        ('{"a", "b", "c"}', '{"a", "b", "d"}'),
        ('row["q"]', 'row["r"]'),
        ("part in {", "part not in {"),
        ("json.dumps", "json.loads"),
    ],
)
def test_it_follows_what_the_code_does(old: str, new: str) -> None:
    assert old in PLAIN
    changed = code_hash(function_of(PLAIN.replace(old, new)))
    assert changed != code_hash(function_of(PLAIN))


IN_ANOTHER_PROCESS = """
import sys, types
from miles.common.code_hash import code_hash
made = sys.modules["some_rows"] = types.ModuleType("some_rows")
exec(compile(sys.argv[1], "there.py", "exec"), made.__dict__)
print(code_hash(made.to_row), end="")
"""


def test_it_is_the_same_in_another_process() -> None:
    hashes = {code_hash(function_of(PLAIN))}
    for seed in ("1", "2"):  # the order of a set's items follows it
        words = [sys.executable, "-c", IN_ANOTHER_PROCESS, PLAIN]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        hashes.add(run.stdout)
    assert len(hashes) == 1


def test_it_follows_closures_and_partials() -> None:
    def make(word: str) -> Any:
        def to_row(row: dict[str, Any]) -> dict[str, Any]:
            return {"text": word, **row}

        return to_row

    assert code_hash(make("a")) == code_hash(make("a"))
    assert code_hash(make("a")) != code_hash(make("b"))

    def with_word(row: Any, word: str) -> Any:
        return word, row

    def hash_with(word: str) -> str:
        return code_hash(functools.partial(with_word, word=word))

    assert hash_with("a") == hash_with("a") != hash_with("b")


def test_functions_that_call_one_another_have_a_hash() -> None:
    source = "def to_row(n): return other(n)\ndef other(n): return to_row(n - 1) if n else 0"
    assert code_hash(function_of(source)) == code_hash(function_of(source))
    assert code_hash(function_of(source)) != code_hash(function_of(source.replace("0", "1")))


def test_values_without_a_lasting_hash_are_refused() -> None:
    source = "f = open('/dev/null')\ndef to_row(row): return f"
    with pytest.raises(NoHashError, match=r"f, which the function uses, is of type .*TextIO"):
        code_hash(function_of(source))

    handle = object()
    with pytest.raises(NoHashError, match="handle, which the function closes over"):
        code_hash(lambda row: handle)


def test_it_follows_a_function_behind_a_cache_or_a_decorator_of_another_module() -> None:
    cached = "import functools\n@functools.cache\ndef helper(n): return n + 1\n"
    cached += "def to_row(row): return helper(row)"
    assert code_hash(function_of(cached)) == code_hash(function_of(cached))
    assert code_hash(function_of(cached)) != code_hash(function_of(cached.replace("+ 1", "+ 2")))

    decorate = function_of(
        "def decorate(f):\n def inner(row): return f(row)\n return inner", "decorate", "helpers"
    )
    plain = function_of("def to_row(row): return row[0]")
    changed = function_of("def to_row(row): return row[1]")
    assert code_hash(decorate(plain)) == code_hash(decorate(plain))
    assert code_hash(decorate(plain)) != code_hash(decorate(changed))
    assert code_hash(functools.partial(decorate(plain))) != code_hash(
        functools.partial(decorate(changed))
    )


def test_a_value_that_contains_itself_is_refused() -> None:
    with pytest.raises(NoHashError, match="contains itself"):
        code_hash(function_of("x = []\nx.append(x)\ndef to_row(row): return x"))
