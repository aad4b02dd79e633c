"""Every file of rows in `cases` is named in a test."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.row_cases import CASES

TESTS = CASES.parents[1]


def is_named(file: Path, texts: str) -> bool:
    """Return whether tests name a file: by itself, with its folder; or as part of a whole folder.

    "shapes/lima.jsonl", or "lima" beside "shapes"; "save-to-disk/dict" for all that is below.
    """

    def is_word(name: str) -> bool:
        return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", texts) is not None

    path = file.relative_to(CASES)
    if is_word(path.parts[0]) and (is_word(file.name) or is_word(file.name.split(".")[0])):
        return True
    folders = [folder.as_posix() for folder in path.parents if len(folder.parts) > 1]
    return any(f'{folder}"' in texts for folder in folders)


def test_every_case_is_named_in_a_test() -> None:
    others = (file for file in TESTS.rglob("*.py") if file != Path(__file__))
    texts = "\n".join(file.read_text(encoding="utf-8") for file in others)
    files = [file for file in sorted(CASES.rglob("*")) if file.is_file()]
    assert len(files) > 100
    unnamed = [str(file.relative_to(CASES)) for file in files if not is_named(file, texts)]
    assert unnamed == []
