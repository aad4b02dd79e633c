"""The demo's rows: two files of JSON lines in OpenHermes-2.5's shape, shipped with the package.

    chat.jsonl   questions, advice, writing, arithmetic, roleplay, twenty languages and more
    code.jsonl   Python, SQL, shell, JavaScript, regular expressions, explanations of code

Each row has the columns of the hub's data set, most of them null. Its `source` tells how it was
written: "miles-demo-written" one by one, "miles-demo-templated" from a sentence frame and a table
of facts. Four rows are broken on purpose (`BROKEN`), so that a first run shows what happens to such
rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent

FILES = {"chat": "chat.jsonl", "code": "code.jsonl"}
"""Name of the source in the demo's mixture -> file."""

BROKEN = {
    ("chat", 151): "no_messages",  # `conversations` is an empty list
    ("chat", 333): "unknown_role",  # a turn by a narrator
    ("code", 83): "malformed_json",  # the line ends in the middle
    ("code", 190): "bad_message",  # the answer's value is null
}
"""(source, row counted from 0) -> the reason why it cannot be used, one of `REJECT_REASONS`."""


def paths() -> dict[str, Path]:
    """Return the shipped files: name of the source -> file."""
    return {name: FOLDER / file for name, file in FILES.items()}


def copy_rows(folder: Path) -> dict[str, Path]:
    """Copy the files into a folder, which is created if need be.

    Returns:
        name of the source -> the copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {name: Path(shutil.copyfile(path, folder / path.name)) for name, path in paths().items()}


def lines(name: str) -> list[str]:
    """Return the rows of one source as they are in its file, the broken ones too."""
    # Not splitlines(): it also splits at characters such as U+2028, which JSON allows in a text.
    return paths()[name].read_text(encoding="utf-8").removesuffix("\n").split("\n")


def texts() -> Iterator[str]:
    """Yield the text of the usable rows, turn by turn, to train the demo's tokenizer on."""
    for name in FILES:
        for number, line in enumerate(lines(name)):
            if (name, number) in BROKEN:
                continue
            row = json.loads(line)
            if row["system_prompt"]:
                yield row["system_prompt"]
            for turn in row["conversations"]:
                yield turn["value"]
