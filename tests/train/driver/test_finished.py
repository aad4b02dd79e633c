"""A finished run says so from its folder alone; where something is left, the run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

import pytest

from miles.cli import main
from miles.common import run_folder
from miles.common.checkpoint_tracker import write_tracker
from miles.train.config import TrainConfig
from miles.train.driver.finished import LAST_STEP, finished_text, report_if_finished
from miles.train.driver.resolved_settings import describe
from miles.train.launch.arguments import parse
from tests.support.checkpoints import write_checkpoint
from tests.support.fault_table import NOTHING, observed
from tests.support.launch import write_model
from tests.support.processes import PROJECT, closed_pipe, without_patience

HEAVY = ("ray", "torch", "megatron", "transformers", "pyarrow", "numpy")


def words(folder: Path, *more: str) -> list[str]:
    """Return a launch line. Its rows are gone, which a finished run does not notice."""
    line = ["--hf-checkpoint", str(folder), "--prompt-data", str(folder / "rows.parquet")]
    saving = ["--save", str(folder / "run"), "--save-hf", str(folder / "export")]
    return [*line, *saving, "--num-rollout", "6", *more]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that a finished run leaves."""
    write_model(tmp_path)
    run = tmp_path / "run"
    write_checkpoint(run, 6, json.dumps({"metrics_lines": 6}))
    write_tracker(str(run), 6)

    end = {"end": 1, "how": LAST_STEP, "next_step": 6}
    (run / run_folder.ATTEMPTS).write_text(json.dumps({"start": 1}) + "\n" + json.dumps(end) + "\n")
    (run / run_folder.CONFIG).write_text(describe(parse(words(tmp_path))))
    (run / run_folder.LEDGER).write_text("{}")
    (run / run_folder.METRICS).write_text('{"step": 0}\n' * 6)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("{}")
    return tmp_path


def says_so(config: TrainConfig) -> bool:
    said: list[str] = []
    is_finished = report_if_finished(config, said.append)
    assert is_finished == bool(said)
    return is_finished


def test_it_needs_neither_ray_nor_torch(folder: Path) -> None:
    code = (
        "import sys; from miles.cli import main; status = main(sys.argv[1:]); "
        f"print(status, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *words(folder)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=240,
    )
    first, last = done.stdout.splitlines()
    assert first == f"  this run is finished: 6 of 6 steps are in {folder}/run/iter_0000006"
    assert last == "0 []"
    assert without_patience(done.stderr) == ""


@pytest.mark.parametrize(
    ("fault", "stream"),
    [
        ("output piped into `head`, which ends", closed_pipe),
        ("output on a full disk", partial(open, "/dev/full", "w")),
    ],
)
def test_it_ends_well_where_nothing_can_be_printed(
    folder: Path,
    fault: str,
    stream: Callable[[], TextIO],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stream() as lost:
        monkeypatch.setattr("sys.stdout", lost)
        assert main(["train", *words(folder)]) == 0
    printed = without_patience(capsys.readouterr().err)
    assert printed.count("\n") == 1
    observed(fault, printed, "miles: the standard output", NOTHING)


@pytest.mark.parametrize(
    "more", [["--num-rollout", "9"], ["--num-epoch", "2"], ["--rollout-seed", "7"]]
)
def test_another_length_or_order_goes_on(folder: Path, more: list[str]) -> None:
    assert says_so(parse(words(folder)))
    assert not says_so(parse(words(folder, *more)))


def test_settings_that_came_later_have_their_defaults(folder: Path) -> None:
    """A run of an older version does not know --split; its files were those that are read now."""
    config = folder / "run" / run_folder.CONFIG
    settings = json.loads(config.read_text())
    assert settings["data"]["sources"][0].pop("split") is None
    assert settings["data"].pop("held_out_fraction") == 0
    config.write_text(json.dumps(settings))
    assert says_so(parse(words(folder)))
    assert not says_so(parse(words(folder, "--split", "all")))
    assert not says_so(parse(words(folder, "--eval-fraction", "0.1")))


def test_a_run_of_adapters_is_another_one(folder: Path) -> None:
    """A run of an older version, whose settings do not know them, trained all weights."""
    config = folder / "run" / run_folder.CONFIG
    settings = json.loads(config.read_text())
    assert settings.pop("lora")["rank"] == 0
    config.write_text(json.dumps(settings))
    assert says_so(parse(words(folder)))

    lora = parse(words(folder, "--lora-rank", "8"))
    assert not says_so(lora)
    config.write_text(describe(lora))
    assert not says_so(lora), "its export is an adapter in PEFT's format"
    (folder / "export/adapter_config.json").write_text("{}")
    assert says_so(lora)
    assert not says_so(parse(words(folder)))


def rewrite(name: str, before: str, after: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "run" / run_folder.LEDGER).unlink(),
        lambda folder: (folder / "export/config.json").unlink(),
        lambda folder: (folder / "run" / run_folder.CONFIG).unlink(),
        lambda folder: (folder / "run" / run_folder.ATTEMPTS).unlink(),
        lambda folder: (folder / "run/iter_0000006/metadata.json").unlink(),
        lambda folder: (folder / "run/iter_0000006/.metadata").unlink(),
        lambda folder: (folder / "run/iter_0000006/__1_0.distcp").unlink(),
        lambda folder: (folder / "run" / run_folder.METRICS).unlink(),
        lambda folder: (folder / "run" / run_folder.METRICS).write_text('{"step": 0}\n{"st'),
        rewrite("run/ledger.json", "}", ""),
        lambda folder: write_tracker(str(folder / "run"), 4),
        rewrite("run/starts.jsonl", LAST_STEP, "SIGTERM"),
        rewrite("run/starts.jsonl", '"end": 1', '"end'),
        rewrite("run/iter_0000006/miles.json", "}", ', "unwritten_metrics": ["{}"]}'),
        rewrite("run/config.json", "{", "["),
    ],
)
def test_what_an_interrupted_end_left_is_the_runs_to_do(
    folder: Path, spoil: Callable[[Path], object]
) -> None:
    config = parse(words(folder))
    assert says_so(config)
    spoil(folder)
    assert not says_so(config)


def test_more_steps_than_are_asked_for() -> None:
    assert finished_text(24, 24, "x").endswith("24 of 24 steps are in x")
    text = finished_text(24, 8, "x")
    assert text.endswith("it has 24 steps, more than the 8 that are asked for; they are in x")
