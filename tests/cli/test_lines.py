"""A line with mistakes: all of them are named at once, with what was meant, and the status is 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.cli import main
from miles.common.mistakes import Mistakes
from miles.common.near_names import closest, meant_path, near_path
from miles.errors import ConfigError, SourceError


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of a line whose status is 2."""
    assert main(line.split()) == 2
    # What is being looked at stands before it on a slow machine.
    _, mark, text = capsys.readouterr().err.partition("miles: error: ")
    assert mark
    return text.rstrip("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prepare", "NAME, --tokenizer and --output are missing; see miles prepare --help"),
        ("convert megatron-to-hf", "--load, --hf-checkpoint and --save are missing; see miles"),
        ("convert verify a", "B is missing; see miles convert verify --help"),
        ("train", "--hf-checkpoint, --save and --prompt-data are missing"),
        (
            "train --save",
            "(1) argument --save: expected one argument; (2) --hf-checkpoint and --pr",
        ),
        ("report r --lr 1", "there is no flag --lr here; miles train has one; see miles report"),
        ("report r s", "word 2 of the line, belongs to no flag; see miles report --help"),
        ("demo --output", "argument --output: expected one argument; see miles demo --help"),
        ("convert hf-to-megatron --lr 3", "(2) --lr says nothing about a conversion"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(line, capsys)


def test_all_mistakes_of_a_command_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "prepare x --max-bad-fraction y --loader-cpus many --overwritten --tokenizr t --output"
    assert error_of(line, capsys) == (
        "6 mistakes: (1) --max-bad-fraction takes a number, not 'y'; (2) --loader-cpus takes a whole "
        "number, not 'many'; (3) argument --output: expected one argument; (4) --tokenizer is "
        "missing; (5) there is no flag --overwritten here; did you mean --overwrite? (6) there is "
        "no flag --tokenizr here; did you mean --tokenizer?"
    )


def test_all_mistakes_of_a_launch_line_are_named_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "train --num-epochs 3 --lr x --lr-decay-style cosin --num-rollout 0 --save s"
    assert error_of(line, capsys) == (
        "5 mistakes: (1) there is no flag --num-epochs; did you mean --num-epoch? (2) --lr takes a "
        "number, not 'x'; (3) --num-rollout must be positive, not 0; (4) --lr-decay-style must be "
        "one of constant, linear, cosine, inverse-square-root, not 'cosin'; did you mean cosine? "
        "(5) --hf-checkpoint and --prompt-data are missing"
    )


def test_flags_that_a_file_may_have_are_not_called_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("save: run\n")
    printed = error_of(f"train --config {tmp_path}/run.yaml --num-epochs 3", capsys)
    assert printed == "there is no flag --num-epochs; did you mean --num-epoch?"
    printed = error_of(f"train --config {tmp_path}/run.yaml", capsys)
    assert printed == "--hf-checkpoint and --prompt-data are missing"


def test_the_name_that_was_meant_is_found() -> None:
    assert closest("trian", ["train", "prepare"]) == "train"
    assert closest("WSd", ["WSD", "linear"]) == "WSD"
    assert closest("nonsense", ["train", "prepare"]) is None
    assert closest("x" * 1_000_000, ["train"]) is None


def test_a_path_that_nearly_exists_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chat.jsonl").touch()
    assert near_path(f"{tmp_path}/data/chta.jsonl") == f"{tmp_path}/data/chat.jsonl"
    assert near_path(f"{tmp_path}/dta/chat.jsonl") == f"{tmp_path}/data/chat.jsonl"
    assert near_path(f"{tmp_path}/dta/x.jsonl") is None
    assert near_path(f"{tmp_path}/data/chat.jsonl") is None
    assert near_path("s3://bucket/chat.jsonl") is None
    assert near_path("") is None
    monkeypatch.chdir(tmp_path)
    assert near_path("data/chta.jsonl") == "data/chat.jsonl"
    assert near_path("dta") == "data"
    assert meant_path("dta") == "; did you mean data?"


def test_a_path_that_nearly_exists_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run", "chat.jsonl", "run.yaml"):
        (tmp_path / name).mkdir()
    for line, meant in {
        f"report {tmp_path}/rum": "run",
        f"inspect {tmp_path}/rum": "run",
        f"compare {tmp_path}/rum {tmp_path}/run": "run",
        f"train --config {tmp_path}/rum.yaml": "run.yaml",
    }.items():
        assert main(line.split()) in (2, 3)
        printed = capsys.readouterr().err
        assert printed.endswith(f"did you mean {tmp_path}/{meant}?\n"), printed


def test_mistakes_inside_of_others_are_numbered_together() -> None:
    inner = Mistakes()
    inner.add([SourceError("a"), ConfigError("b?")])
    outer = Mistakes(" here")
    outer.of(inner.raise_all)
    assert outer.of(lambda: 5) == 5
    outer.add([ConfigError("c.")])
    with pytest.raises(SourceError, match=r"^3 mistakes here: \(1\) a; \(2\) b\? \(3\) c\.$"):
        outer.raise_all()
    Mistakes().raise_all()
