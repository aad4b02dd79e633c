"""The code on the pages of the documentation, as a reader would type it.

blocks("README.md")             its ```bash and ```python blocks
typed(block, ASSETS="assets")   [["miles", "prepare", …], ["miles", "train", …]]: as bash reads it
run_python(block, names)        its statements; a line that is an expression is shown
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.support.processes import PROJECT

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md")))

EXECUTED = {
    "README.md: make demo    # the main job, end to end, on rows t": "integration/test_commands.py",
    "README.md: import miles": "integration/test_stranger.py",
    "README.md: miles prepare openhermes --tokenizer Qwen3-4B-Base": "integration/test_stranger.py",
    'docs/adding-a-model.md: """Mistral 7B (v0.2, v0.3) and Nemo: grouped queri': (
        "architecture/test_adding_a_model.py"
    ),
    "docs/adding-a-model.md: Parameter(": "docs/test_code_blocks.py",
    "docs/chat.md: miles chat run                     # its newest ch": (
        "integration/test_stranger.py"
    ),
    "docs/chat.md: miles generate run --prompts questions.jsonl --out": (
        "integration/test_stranger.py"
    ),
    "docs/first-run.md: ASSETS=../shared/assets": "integration/test_stranger.py",
    "docs/first-run.md: import miles": "integration/test_stranger.py",
    "docs/lora.md: from peft import PeftModel": "integration/test_stranger.py",
    "docs/order.md: grep '\"step\": 1200,' runs/old/metrics.jsonl runs/n": (
        "docs/test_code_blocks.py"
    ),
    "docs/rows.md: def to_messages(row):": "docs/test_code_blocks.py",
}
"""Block -> the file of the test that runs it, with small stand-ins for its models and rows."""

PARSED = {
    'docs/chat.md: echo "What is 2+2?" | miles chat run > answer.txt': (
        "the same chat as in the block before, which is run"
    ),
    "docs/continue-with-rl.md: miles train --hf-checkpoint Qwen3-4B-Base --save s": (
        "the rest of the line is left to the reader (…), and the second half is a script of Miles"
    ),
    "docs/continue-with-rl.md: miles convert merge-adapter --adapter sft --hf-che": (
        "merging is tested in convert/test_merge_adapter.py"
    ),
    "docs/continue-with-rl.md: miles convert hf-to-megatron --hf-checkpoint Qwen3": (
        "its second half is a script of Miles; converting is part of the demo"
    ),
    "docs/continue-with-rl.md: python3 -m venv /shared/sft && /shared/sft/bin/pip": (
        "it installs an environment, and needs a Ray cluster that takes jobs"
    ),
    "docs/continue-with-rl.md: ray job submit --working-dir . --runtime-env-json ": (
        "it needs a Ray cluster that takes jobs"
    ),
    "docs/first-run.md: python -m pipelines.run_qwen3_sft --model-name Qwe": (
        "the model has 235 B parameters; the recipes' own lines run in pipelines/test_recipes.py"
    ),
    "docs/report.md: miles report runs/real/run              # writes r": (
        "its first line is also the last of docs/first-run.md, which is run; its second one serves "
        "until Ctrl-C, as in tests/report"
    ),
}
"""Block -> why its commands are read by their parsers only."""

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRINTED = r"""
PATH=/none
command_not_found_handle() { printf '%s\0' "$@"; printf '\n\0'; }
"""
"""No command is found, so that bash gives each with its words to this function."""


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str
    line: int
    """of the page, from 1"""
    language: str
    text: str

    def with_stand_ins(self, places: Mapping[str, str]) -> Block:
        """Return the block with other names in place of those of the page, each of which it has."""
        text = self.text
        for place, stand_in in places.items():
            assert place in text, f"{self.name}: it has no {place}"
            text = text.replace(place, stand_in)
        return replace(self, text=text)

    @property
    def name(self) -> str:
        """Return how the tests call it: the page and the first line that is no comment."""
        lines = (line.strip() for line in self.text.splitlines())
        first = next(line for line in lines if line and not line.startswith("#"))
        return f"{self.page}: {first[:50]}"


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of bash and Python of a page."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match[1], match[2])


def block(page: str, begins: str) -> Block:
    """Return the block of a page whose first line begins with a text."""
    (found,) = [found for found in blocks(page) if found.name.startswith(f"{page}: {begins}")]
    return found


def typed(block: Block) -> list[list[str]]:
    """Return the words of each command of a block of bash, as bash gives them to the command."""
    done = subprocess.run(
        ["bash", "-c", _PRINTED + block.text], capture_output=True, text=True, check=True
    )
    commands: list[list[str]] = [[]]
    for word in done.stdout.split("\0"):
        if word == "\n":
            commands.append([])
        else:
            commands[-1].append(word)
    assert not done.stderr, done.stderr
    return [words for words in commands if words and words != [""]]


def run_python(block: Block, names: dict[str, Any]) -> list[Any]:
    """Run a block of Python; return the values of its lines that are expressions.

    Args:
        names: that the block sees, and those that it binds.
    """
    tree = ast.parse(block.text, f"{block.page}:{block.line}")
    shown = []
    for node in tree.body:
        if isinstance(node, ast.Expr):
            code = compile(ast.Expression(node.value), f"{block.page}:{block.line}", "eval")
            shown.append(eval(code, names))  # noqa: S307
        else:
            code = compile(ast.Module([node], []), f"{block.page}:{block.line}", "exec")
            exec(code, names)  # noqa: S102
    return shown
