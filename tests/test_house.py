"""The rules of the house that no other tool checks: sizes, signatures, imports, and what pages name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[1]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_ARGUMENTS = 7

FRONT_DOORS = {
    "miles/data/encoding/encoder.py: encode",
    "miles/data/notebook/prepare.py: prepare",
    "miles/data/notebook/dataset.py: Prepared.steps",
    "miles/train/model/attention.py: PackedAttention.__init__",  # the signature is Megatron's
}
"""Functions for users, or with a signature that is not ours: they may take more arguments."""


def tracked_files(*patterns: str) -> list[Path]:
    """Return the files that git tracks, or would: ignored ones are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listed.stdout.split() if (path := PROJECT / name).exists()]


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each function and method of a module, with its qualified name."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield f"{prefix}{child.name}", child
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")

    yield from visit(tree, "")


def num_lines_without_docstring(function: ast.FunctionDef) -> int:
    num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
    docstring = function.body[0] if ast.get_docstring(function) else None
    if docstring is None:
        return num_lines
    return num_lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def is_triton_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_files_and_functions_fit_on_a_page() -> None:
    too_long = []
    for path in tracked_files("*.py"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(PROJECT)
        if len(text.splitlines()) > MAX_FILE_LINES:
            too_long.append(f"{name}: {len(text.splitlines())} lines")
        for function, node in functions(ast.parse(text)):
            num_lines = num_lines_without_docstring(node)
            if num_lines > MAX_FUNCTION_LINES:
                too_long.append(f"{name}: {function}: {num_lines} lines")
    assert not too_long, "\n".join(too_long)


def test_signatures_are_short() -> None:
    too_many = []
    for path in tracked_files("miles/**.py", "pipelines/**.py", "benchmarks/**.py"):
        for function, node in functions(ast.parse(path.read_text(encoding="utf-8"))):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments]
            num_arguments = len(names) - (names[:1] in (["self"], ["cls"]))
            where = f"{path.relative_to(PROJECT)}: {function}"
            if is_triton_kernel(node):  # it gets each tensor and each size by itself
                continue
            if num_arguments > MAX_ARGUMENTS and where not in FRONT_DOORS:
                too_many.append(f"{where}: {num_arguments} arguments")
    assert not too_many, "\n".join(too_many)


def test_tests_do_not_import_each_other() -> None:
    importing = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*(?:test_\w+|conftest)\b", re.M)
    found = []
    for path in tracked_files("tests/**.py"):
        if importing.search(path.read_text(encoding="utf-8")):
            found.append(str(path.relative_to(PROJECT)))
    assert not found


def test_every_room_has_a_sign() -> None:
    bare = []
    for path in tracked_files("miles/**__init__.py"):
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            bare.append(str(path.relative_to(PROJECT)))
    assert not bare


def test_the_front_page_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_pages_link_to_what_is_there() -> None:
    link = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
    missing = []
    for page in tracked_files("*.md"):
        for target in link.findall(page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                missing.append(f"{page.relative_to(PROJECT)}: {target}")
    assert not missing, "\n".join(missing)


def test_pages_name_files_and_functions_that_are_there() -> None:
    """Decisions are dated: they may name what was there on their day."""
    code = re.compile(r"`([^`\n]+)`")
    missing = []
    for page in tracked_files("*.md"):
        if "decisions" in page.parts or page.name == "CHANGELOG.md":
            continue
        for words in code.findall(page.read_text(encoding="utf-8")):
            if not exists(words):
                missing.append(f"{page.relative_to(PROJECT)}: {words}")
    assert not missing, "\n".join(missing)


FOREIGN = {"miles.json", "miles.rollout.sft_rollout.generate_rollout"}
"""A file of a checkpoint, and a function of Miles that a launch line names."""


def exists(words: str) -> bool:
    """Return whether a path or dotted name of ours exists. Other words do exist."""
    if re.fullmatch(r"(?:miles|tests|benchmarks|pipelines|docs)/[\w/.-]+", words):
        return (PROJECT / words).exists()
    if words in FOREIGN or not re.fullmatch(r"miles(?:\.\w+)+", words):
        return True

    parts = words.split(".")
    for length in range(len(parts), 0, -1):
        module = PROJECT.joinpath(*parts[:length])
        for path in (module.with_suffix(".py"), module / "__init__.py"):
            if path.exists():
                return defines(ast.parse(path.read_text(encoding="utf-8")), parts[length:])
    return False


def defines(tree: ast.Module, names: list[str]) -> bool:
    """Return whether a module binds a name, or a class of it a method or field."""
    body: list[ast.stmt] = tree.body
    for name in names:
        bound = [node for node in body if name in names_bound_by(node)]
        if not bound:
            return False
        body = getattr(bound[0], "body", [])
    return True


def names_bound_by(statement: ast.stmt) -> set[str]:
    """Return the names that a definition, an assignment or an import binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.AnnAssign | ast.Assign):
        return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.If | ast.Import | ast.ImportFrom):
        aliases = [node for node in ast.walk(statement) if isinstance(node, ast.alias)]
        return {alias.asname or alias.name for alias in aliases}
    return set()


IMPORTED_EARLY = (
    "miles.architecture",
    "miles.data.config",
    "miles.train.config",
    "miles.train.driver",
    "miles.train.launch",
    "miles.train.parallel_layout",
    "miles.train.types",
)
"""Modules, and packages with all that is in them."""

_IMPORT_ALL = """
import importlib, pkgutil, sys

for name in sys.argv[1:]:
    room = importlib.import_module(name)
    path = getattr(room, "__path__", [])  # a package has one
    inside = [module.name for module in pkgutil.walk_packages(path, name + ".")]
    for module in [name, *inside]:
        importlib.import_module(module)
        for heavy in ("torch", "megatron"):
            if heavy in sys.modules:
                sys.exit(f"importing {module} imports {heavy}")
"""


def test_settings_and_driver_import_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *IMPORTED_EARLY], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_text_is_read_as_markup() -> None:
    """rich takes `[v2]` in a string for a tag, and a path would lose it. Styles are `Text`'s."""
    found = []
    for path in tracked_files("miles/**.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if reads_markup(node):
                found.append(f"{path.relative_to(PROJECT)}:{node.lineno}")  # type: ignore[attr-defined]
    assert not found, "\n".join(found)


STYLE_TAG = re.compile(r"\[/?(?:bold|dim|red|green|cyan|yellow|italic)[ \w]*\]")


def reads_markup(node: ast.AST) -> bool:
    """Return whether a node makes a console or a column that reads markup, or is markup."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(STYLE_TAG.search(node.value))
    if not isinstance(node, ast.Call):
        return False

    name = ast.unparse(node.func).rsplit(".", 1)[-1]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name == "Console" or (name == "TextColumn" and "{" in ast.unparse(node)):
        return given.get("markup") != "False"
    return name == "from_markup" or given.get("markup") == "True"


def test_no_noun_has_its_plural_in_brackets() -> None:
    """A person reads "1 row" or "2 rows" (`miles.common.counts`), never "1 row" with "(s)"."""
    bracket = re.compile(r"\w\((?:s|es|ies)\)")
    found = []
    for path in tracked_files("miles/**.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and bracket.search(node.value):  # type: ignore[attr-defined]
                found.append(f"{path.relative_to(PROJECT)}:{node.lineno}")  # type: ignore[attr-defined]
    assert not found, "\n".join(found)
