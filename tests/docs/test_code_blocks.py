"""The code on the pages: each block is run by a test, or read by the parsers of its commands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from miles.architecture import parameters
from miles.cli.commands import build_parser as build_command_parser
from miles.train.launch.known_flags import require_known, written_flags
from miles.train.launch.parser import build_parser, launch_settings
from miles.train.launch.refusals import REFUSALS
from pipelines import run_qwen3_sft
from tests.support.pages import EXECUTED, PAGES, PARSED, Block, block, blocks, run_python, typed
from tests.support.processes import PROJECT

ALL = {found.name: found for page in PAGES for found in blocks(page)}


def test_every_block_is_run_or_parsed() -> None:
    assert len(ALL) == sum(len(list(blocks(page))) for page in PAGES), "two blocks have one name"
    assert not EXECUTED.keys() & PARSED.keys()
    assert ALL.keys() == EXECUTED.keys() | PARSED.keys(), "see tests/support/pages.py"


def test_the_tests_that_run_blocks_read_the_pages() -> None:
    """They take the code from the page itself, and have no copy of it."""
    for name, file in EXECUTED.items():
        page = name.split(":")[0]
        assert page in (PROJECT / "tests" / file).read_text(encoding="utf-8"), name


def commands_of(found: Block) -> list[list[str]]:
    """Return the commands of a block that is only read, and the flags that it keeps in an array."""
    text = found.text.replace("/shared/sft/bin/", "").replace(" > answer.txt", "")
    if "CKPT_ARGS=(" in text:
        text += 'script "${CKPT_ARGS[@]}"\n'
    return typed(Block(found.page, found.line, found.language, text))


def require_parsed(words: list[str]) -> None:
    """Assert that a command takes the flags of a line."""
    words = [word for word in words if word != "…"]  # the reader's own flags
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    if words[:2] == ["python3", "train_async.py"]:
        assert (PROJECT / words[1]).exists()
        words = ["miles", "train", *words[2:]]

    if words[:2] == ["miles", "train"]:
        for flag in written_flags(words):
            require_known(flag, launch_settings())
        _, unknown = build_parser().parse_known_args(words[2:])
        assert not unknown
    elif words[0] == "miles":
        build_command_parser().parse_args(words[1:])
    elif words[0] == "script":
        for flag in written_flags(words):
            require_known_in_miles(flag)
    else:
        assert words[0] in ("pip", "mkdir", "python3"), words


def require_known_in_miles(flag: str) -> None:
    """Assert that a flag is one of Miles: taken here, or refused by its name."""
    if flag not in launch_settings():
        assert any(refusal.covers(flag[2:].replace("-", "_")) for refusal in REFUSALS), flag


@pytest.mark.parametrize(
    "name", [name for name in PARSED if "pipelines" not in name], ids=lambda name: name[:40]
)
def test_commands_take_the_flags_of_the_page(name: str) -> None:
    commands = commands_of(ALL[name])
    assert commands
    for words in commands:
        require_parsed(words)


def test_a_recipe_takes_the_flags_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes as far as the model, which is not there."""
    (words,) = typed(block("docs/first-run.md", "python -m pipelines.run_qwen3_sft"))
    assert words[:3] == ["python", "-m", run_qwen3_sft.__name__]
    words = [word.replace("/shared", str(tmp_path)) for word in words[3:]]
    assert run_qwen3_sft.main(words) == 3
    assert "Qwen3-235B-A22B/config.json: no such file" in capsys.readouterr().err


def test_a_parameter_is_what_the_page_says() -> None:
    (parameter,) = run_python(
        block("docs/adding-a-model.md", "Parameter("), vars(parameters).copy()
    )
    assert len(parameter.shapes) == 2


def test_the_transform_of_the_page_makes_messages() -> None:
    names: dict[str, Any] = {}
    assert run_python(block("docs/rows.md", "def to_messages(row):"), names) == []
    row = {"language": "en", "question": {"text": "2+2?"}, "answers": ["Four.", "4"]}
    question, answer = names["to_messages"](row)
    assert (question["content"], answer["content"]) == ("2+2?", "Four.")
    assert names["to_messages"]({**row, "language": "de"}) is None


def test_the_fingerprints_of_a_step_are_found(tmp_path: Path) -> None:
    for run, fingerprint in (("old", "abc"), ("new", "abc")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        lines = [
            f'{{"step": {step}, "data/step_fingerprint": "{fingerprint}"}}'
            for step in (1200, 12000)
        ]
        (tmp_path / "runs" / run / "metrics.jsonl").write_text("\n".join(lines))
    code = block("docs/order.md", "grep").text
    done = subprocess.run(["bash", "-ec", code], cwd=tmp_path, capture_output=True, text=True)
    found = re.findall(r'"data/step_fingerprint": "abc"', done.stdout)
    assert len(found) == 2, done
