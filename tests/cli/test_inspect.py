"""What `miles inspect` prints: names as they are, and settings that can be pasted."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from miles.cli import main
from miles.cli.commands import build_parser
from miles.cli.inspect import encoding_of
from miles.common.flags import settings_of
from miles.data.config import EncodeConfig
from miles.report.first_batch import inspect_run
from miles.train.launch.parser import given_values
from tests.support.streams import demo_tokenizer

BRACKETS = "[red]x[/red]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run that kept its first batch."""
    segment = {"source": BRACKETS, "file": "[/bold].jsonl", "row": 3}
    tokens = {"input_ids": [5, 6], "loss_mask": [0, 1]}
    content = {"tokenizer": str(demo_tokenizer()), "micro_batches": [[{**segment, **tokens}]]}
    (tmp_path / "first_batch.json").write_text(json.dumps(content))
    return tmp_path


def test_names_are_printed_as_they_are(folder: Path) -> None:
    screen = io.StringIO()
    inspect_run(str(folder), Console(file=screen, width=100), 1)
    assert f"{BRACKETS} · [/bold].jsonl row 3 · 2 tokens, 1 trained" in screen.getvalue()


@pytest.mark.parametrize(
    "config",
    [
        *("", '{"data": {"enc', "{}", "[]", "null", '{"data": {}}', '{"data": []}'),
        *('{"data": {"encode": null}}', '{"data": {"encode": []}}'),
    ],
)
def test_a_broken_config_is_left_away(
    folder: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_text(config)
    assert encoding_of(str(folder)) is None
    assert main(["inspect", str(folder)]) == 0
    assert "encoded with" not in capsys.readouterr().out


def test_an_unreadable_config_is_left_away(folder: Path) -> None:
    assert encoding_of(str(folder)) is None
    (folder / "config.json").write_bytes(b"\xff\xfe")
    assert encoding_of(str(folder)) is None


def test_the_settings_can_be_pasted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode: dict[str, object] = {"tokenizer": "t", "template_kwargs": {"mark": "[b] :smile: it's"}}
    encode["too_long"] = "error"
    (folder / "config.json").write_text(json.dumps({"data": {"encode": encode}}))
    assert main(["inspect", str(folder)]) == 0
    line = capsys.readouterr().out.split("encoded with ")[1]
    flags = build_parser().parse_args(["certify", "t", *shlex.split(line)])
    assert given_values(flags, settings_of(EncodeConfig)) == {
        "--apply-chat-template-kwargs": {"mark": "[b] :smile: it's"},
        "--too-long": "error",
    }


@pytest.mark.parametrize(
    ("words", "environment", "has_colours"),
    [
        ([], {}, False),
        (["--color", "always"], {}, True),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
        (["--color", "never"], {"FORCE_COLOR": "1"}, False),
        ([], {"FORCE_COLOR": "1"}, True),
        ([], {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_trained_tokens_are_marked_in_a_pipe(
    folder: Path,
    words: list[str],
    environment: dict[str, str],
    has_colours: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["inspect", str(folder), *words]) == 0
    text = capsys.readouterr().out
    assert ("\x1b[38;5" in text) == has_colours
    assert text.count("[[") == (0 if has_colours else 2), "in the legend, and in the text"
    assert ("trained tokens are green" in text) == has_colours


def test_a_heading_is_never_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "first_batch.json"
    path.write_text(path.read_text().replace("[/bold]", "[/bold]" + 300 * "x"))
    assert main(["inspect", str(folder)]) == 0
    assert 300 * "x" + ".jsonl row 3 · 2 tokens, 1 trained\n" in capsys.readouterr().out


def test_what_a_finished_run_did_not_use_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {
        "row_shape": "messages",
        "rows": 9,
        "epochs": 1.0,
        "counts": {"read": 9, "trained": 7, "unknown_role": 2},
        "keys_not_used": {"mood": 3},
    }
    (folder / "ledger.json").write_text(json.dumps({"chat": entry}))
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "\ndropped: 2 unknown_role\n    unknown_role: say what the role means" in printed
    assert "\nkeys not used: mood (3 rows)\n" in printed

    (folder / "ledger.json").write_text('{"chat": {"counts": []}}')
    assert main(["inspect", str(folder)]) == 0
    assert "not used" not in capsys.readouterr().out
