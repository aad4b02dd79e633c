"""A command says what it does from the first moment on, on a terminal and in a pipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles.common import patience
from miles.common.first_contact import announced
from tests.support.processes import LIMIT_SECONDS, PROJECT
from tests.support.streams import demo_tokenizer
from tests.support.terminal import in_terminal

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}

SCRIPT = """
import sys, time
from miles.common import output, patience
patience.LONG_SECONDS = 1.0
with patience.until_answered("looking at the rows"), output.outlived():
    time.sleep(0.8)
    print("a line")
    patience.doing("starting Ray", is_long=True)
    time.sleep(0.5)
    patience.doing("certifying the tokenizer")
    time.sleep(1.3)
    patience.answered()
    print("half", end="", flush=True)
    patience.doing("never drawn into a line")
    time.sleep(0.5)
    print(" a line")
"""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have little to wait for."""
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(patience, "_TICK_SECONDS", 0.01)


def test_a_line_changes_in_place_on_a_terminal() -> None:
    session = in_terminal([sys.executable, "-c", SCRIPT])
    assert session.status == 0, session.raw
    assert session.screen == "a line\n  certifying the tokenizer: 1 s\nhalf a line\n"
    assert session.raw.count("  looking at the rows\r") > 1
    assert "  starting Ray\r" in session.raw
    assert "never drawn" not in session.raw


def test_a_pipe_gets_plain_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("0.8", "1.5")],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.stdout == "a line\nhalf a line\n"
    assert done.stderr.splitlines() == [
        "miles: looking at the rows",
        "miles: looking at the rows took 2 s",
        "miles: starting Ray",
        "miles: certifying the tokenizer",
        "miles: certifying the tokenizer took 1 s",
    ]


def test_a_quick_answer_is_all_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with patience.until_answered("looking"):
        patience.doing("counting")
        patience.answered()
        time.sleep(0.2)
    with patience.until_answered("looking"):
        pass
    assert capsys.readouterr().err == ""


def test_a_context_inside_of_another_adds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    printed = ""
    deadline = time.monotonic() + LIMIT_SECONDS
    with patience.until_answered("looking"), patience.until_answered("another"):
        while not printed and time.monotonic() < deadline:
            time.sleep(0.02)
            printed = capsys.readouterr().err
    assert printed == "miles: looking\n"


def test_a_server_that_does_not_answer_has_a_line_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with patience.until_answered("looking"), announced("s3://bucket/rows"):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_a_line_is_cut_at_the_edge_of_the_screen() -> None:
    script = (
        "import time\nfrom miles.common import patience\n"
        "with patience.until_answered('looking at ' + 30 * 'rows '): time.sleep(0.5)"
    )
    session = in_terminal([sys.executable, "-c", script], columns=40)
    assert session.screen.strip() == ""
    drawn = [line.strip("\x1b[K") for line in session.raw.split("\r")]
    assert max(map(len, drawn)) == 39


def test_train_speaks_before_it_loads_torch_and_ray(tmp_path: Path) -> None:
    """The import of either ends the process; what is on the screen until then was said before."""
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    shutil.copytree(demo_tokenizer(), tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG))
    script = """
import sys, time
class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "ray", "transformers"):
            time.sleep(0.5)
            print(f"{name} is imported", flush=True)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Refusal())
from miles.cli import main
sys.exit(main(sys.argv[1:]))
"""
    words = ["train", "--hf-checkpoint", tmp_path / "hf", "--save", tmp_path / "run"]
    words += ["--prompt-data", tmp_path / "rows.jsonl"]
    session = in_terminal([sys.executable, "-c", script, *words])
    said, _, after = session.raw.partition(" is imported")
    assert after, session.raw
    assert "\x1b[K  " in said, session.raw
