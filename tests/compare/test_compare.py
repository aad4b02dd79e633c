"""`miles compare`: the same data up to which step, settings, losses, and what cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.cli import main
from miles.common.checkpoint_tracker import write_tracker
from miles.compare.comparison import compare, spread
from miles.compare.runs import read_run
from miles.compare.text import lines_of
from tests.support.checkpoints import write_checkpoint


def write_run(
    folder: Path,
    fingerprints: list[str | None],
    *,
    tokens_a_step: int = 100,
    loss: float = 4.0,
    settings: dict[str, Any] | None = None,
    first: int = 0,
) -> str:
    """Write the folder of a run: its metrics, and where settings are given its config.json."""
    folder.mkdir(parents=True)
    lines = []
    for number, fingerprint in enumerate(fingerprints, first):
        line: dict[str, Any] = {"step": number, "sft/loss": loss - 0.1 * number, "sft/epoch": 0.1}
        line["sft/tokens_seen"] = (number + 1) * tokens_a_step
        if fingerprint is not None:
            line["data/step_fingerprint"] = fingerprint
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if settings is not None:
        content = {"save": str(folder), "hf_checkpoint": "m", **settings}
        (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def settings_of(lr: float = 1e-5, seed: int = 42) -> dict[str, Any]:
    return {"optimizer": {"lr": lr}, "data": {"order": {"seed": seed, "weights": []}}, "seed": 1}


def comparison_of(*folders: str) -> Any:
    return compare([read_run(folder, print) for folder in folders])


SAME = ["a", "b", "c", "d"]


def test_the_same_data_in_all_common_steps(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", SAME, settings=settings_of())
    other = write_run(tmp_path / "b", SAME[:3], settings=settings_of(lr=2e-5))
    comparison = comparison_of(first, other)
    (verdict,) = comparison.data
    assert (verdict.is_same, verdict.num_compared, verdict.first_difference) == (True, 3, None)
    assert verdict.sentence() == "the same rows and tokens in all 3 compared steps"
    (difference,) = comparison.settings
    assert (difference.name, difference.values) == ("--lr", (1e-5, 2e-5))


def test_the_first_other_step_is_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", SAME)
    other = write_run(tmp_path / "b", ["a", "b", "x", "d"])
    (verdict,) = comparison_of(first, other).data
    assert (verdict.is_same, verdict.same_until, verdict.first_difference) == (False, 1, 2)
    assert (verdict.fingerprints, verdict.num_different) == (("c", "x"), 1)
    (verdict,) = comparison_of(first, write_run(tmp_path / "c", ["x", "b", "c", "d"])).data
    assert verdict.same_until is None
    assert verdict.sentence().startswith("from the first step on other data: 1 of 4 steps")


def test_what_decides_the_data_is_named_as_the_cause(tmp_path: Path) -> None:
    folders = []
    for name, seed in (("a", 1), ("b", 2)):
        folders.append(write_run(tmp_path / name, [name] * 4, settings=settings_of(seed=seed)))
        cursor = {"cursor": {"seed": seed, "manifest_fingerprint": "m", "shuffle": True}}
        write_checkpoint(tmp_path / name, 4, json.dumps(cursor))
        write_tracker(folders[-1], 4)
    comparison = comparison_of(*folders)
    assert comparison.data[0].causes == ("seed",)
    assert [difference.name for difference in comparison.settings] == ["--rollout-seed"]


def test_what_is_not_kept_cannot_be_told(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", SAME, settings=settings_of())
    some = comparison_of(first, write_run(tmp_path / "b", ["a", None, "c", None])).data[0]
    assert some.is_same
    assert some.sentence().endswith("; of 2 other common steps it cannot be told")
    none = comparison_of(first, write_run(tmp_path / "c", [None] * 4))
    assert none.data[0].is_same is None
    assert none.data[0].sentence().startswith("cannot be told: of the 4 common steps, none has")
    assert none.settings is None
    assert "  cannot be told: a run has no config.json that can be read" in lines_of(none)


def test_losses_stand_at_common_tokens_where_steps_have_other_sizes(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", SAME * 4, tokens_a_step=100)
    other = write_run(tmp_path / "b", SAME, tokens_a_step=250, loss=5.0)
    comparison = comparison_of(first, other)
    assert comparison.axis == "tokens"
    points = {point.at: point.losses for point in comparison.losses}
    assert list(points) == list(range(300, 1001, 100)), "between what both runs have"
    # The step of B that comes to 300 tokens is its second one; of A, its third.
    assert points[300] == (pytest.approx(4.0 - 0.2), pytest.approx(5.0 - 0.1))
    assert points[1000] == (pytest.approx(4.0 - 0.9), pytest.approx(5.0 - 0.3))


def test_the_command_prints_80_columns_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        write_run(tmp_path / name, SAME * 50, loss=loss, settings=settings_of(lr=lr))
        for name, loss, lr in (("a", 4.0, 1e-5), ("b", 4.5, 2e-5), ("c", 9.0, 3e-5))
    ]
    assert main(["compare", *folders, "--json", str(tmp_path / "c.json")]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    assert "the same rows and tokens in all 200 compared steps" in shown
    assert "            0    4.0000    4.5000    9.0000   +0.5000   +5.0000" in lines
    chart = "\n".join(line for line in lines if "|" in line)
    assert chart.count("\n") == 9
    assert {"A", "C"} <= set(chart)

    assert main(["compare", *folders, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "c.json").read_text())
    assert [run["steps"] for run in printed["runs"]] == [200, 200, 200]
    assert printed["data"][1]["is_same"] is True
    assert printed["losses"]["points"][0] == {"at": 0, "losses": [4.0, 4.5, 9.0]}


def test_runs_with_nothing_in_common_end_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path / "a", SAME, tokens_a_step=0)
    later = write_run(tmp_path / "b", SAME, first=10, tokens_a_step=0)
    (tmp_path / "b" / "metrics.jsonl").write_text(
        (tmp_path / "b" / "metrics.jsonl").read_text().replace('"sft/tokens_seen"', '"old"')
    )
    assert main(["compare", first, later]) == 1
    printed = capsys.readouterr()
    assert "cannot be told: the runs have no step in common" in printed.out
    assert printed.err.splitlines()[-1].startswith("miles: error: the losses of these runs cannot")


def test_broken_lines_are_named_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path / "a", SAME)
    other = write_run(tmp_path / "b", SAME)
    metrics = tmp_path / "b" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + "\0\0\n" + "".join(lines[2:]))
    assert main(["compare", first, other]) == 0
    printed = capsys.readouterr()
    assert "line 2 cannot be read" in printed.err
    assert "in all 3 compared steps" in printed.out


def test_few_values_are_spread_from_the_first_to_the_last() -> None:
    assert spread(range(100), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]
