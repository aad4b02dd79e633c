"""`miles inspect` tells what a path is, and its facts, whatever lies there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.cli import main
from miles.demo.model import build_model
from miles.report.subject import subject_of
from tests.support.processes import miles_here

MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ten rows, the last of which has the longest answer."""
    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    lines = []
    for number in range(10):
        answer = {"role": "assistant", "content": "4 " * (number + 1)}
        lines.append(json.dumps({"messages": [MESSAGES[0], answer]}))
    path.write_text("\n".join(lines))
    return path


def test_a_hugging_face_folder(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    build_model(chatml_tokenizer_folder, tmp_path / "hf")
    facts = json.loads(miles_here("inspect", tmp_path / "hf", "--json"))
    assert facts["kind"] == "a Hugging Face folder"
    assert facts["model"].startswith("qwen3, ")
    assert facts["number format"].startswith("float32 (")
    assert facts["files"].startswith("1 file of .safetensors")


def test_raw_rows_with_and_without_a_tokenizer(rows: Path, chatml_tokenizer_folder: Path) -> None:
    facts = json.loads(miles_here("inspect", rows, "--json"))
    assert (facts["kind"], facts["rows"], facts["row shape"]) == ("rows", 10, "messages")
    assert "--tokenizer DIR shows rows" in miles_here("inspect", rows)

    words = ("inspect", rows, "--tokenizer", chatml_tokenizer_folder, "--color", "never")
    longest = miles_here(*words, "--where", "longest", "--samples", "1")
    assert "[[4 4 4 4 4 4 4 4 4 4" in longest
    third = miles_here(*words, "--rows", "3")
    assert "4 4 4 4" in third
    assert "4 4 4 4 4" not in third


def test_prepared_rows_and_their_manifest(
    rows: Path, chatml_tokenizer_folder: Path, tmp_path: Path
) -> None:
    words = ("--tokenizer", chatml_tokenizer_folder, "--output", tmp_path / "out")
    printed = miles_here("prepare", "chat", "--source", rows, *words)
    assert f"10 of 10 rows are in {tmp_path}/out" in printed
    assert "miles train --hf-checkpoint runs/chat-tiny --prompt-data chat" in printed
    manifest = tmp_path / "out" / "manifest.json"
    assert "--tokenizer DIR shows rows" in miles_here("inspect", manifest)
    for path in (tmp_path / "out", tmp_path / "out" / "manifest.json"):
        facts = json.loads(miles_here("inspect", path, "--json"))
        assert (facts["kind"], facts["written"]) == ("rows that miles prepare wrote", 10)


def test_a_run_and_a_checkpoint_and_an_adapter(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": n, "sft/loss": 2.0 - n, "sft/epoch": 1.0} for n in range(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"hf_checkpoint": "/models/x", "save": str(run), "optimizer": {"lr": 0.5}}
    (run / "config.json").write_text(json.dumps(settings))
    facts = json.loads(miles_here("inspect", run, "--json"))
    assert (facts["kind"], facts["steps"], facts["loss"]) == ("a run", 2, "2.0000 -> 1.0000")
    assert "--lr 0.5" in facts["settings"]
    assert "the first step is not trained yet" in miles_here("inspect", run)

    checkpoint = tmp_path / "iter_0000007"
    checkpoint.mkdir()
    (checkpoint / ".metadata").touch()
    (checkpoint / "__0_0.distcp").write_bytes(b"x" * 2_000_000)
    (checkpoint / "miles.json").write_text(json.dumps({"cursor": {"tokens_seen": 5}}))
    facts = json.loads(miles_here("inspect", checkpoint, "--json"))
    assert facts["kind"] == "a Megatron checkpoint"
    assert (facts["trained tokens"], facts["files"]) == (5, "1 file of .distcp, 2.0 MB")


def test_what_cannot_be_shown_is_named(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(rows), "--rows", "1", "--where", "longest"]) == 2
    assert "--rows and --where both say which rows to show" in capsys.readouterr().err
    assert main(["inspect", str(rows), "--rows", "x"]) == 2
    assert "row numbers from 0 were expected" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing")]) == 3
    assert "no such file" in capsys.readouterr().err


def test_a_run_whose_last_loss_is_not_finite(tmp_path: Path) -> None:
    lines = [{"step": 0, "sft/loss": 2.5}, {"step": 1, "sft/loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text('{"save": 5}')
    assert subject_of(str(tmp_path)).facts["loss"] == "2.5000 -> not finite"
