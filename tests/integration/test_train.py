"""Whole runs of `train`: evaluation, answers, which checkpoints stay, the export, skipped steps, a
slow trainer.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

from miles.common import run_folder
from miles.common.secret import Secret
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.data.config import PackConfig, StreamConfig
from miles.data.stream.eval_rows import eval_config
from miles.demo.model import TinySizes, build_model
from miles.demo.tokenizer import CHAT_TEMPLATE
from miles.errors import DivergedError, SourceError
from miles.report.report import write_report
from miles.train.config import ClusterConfig, EvalConfig, TrainConfig
from miles.train.driver import group
from miles.train.driver.loop import train
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.rank.actor import TrainerActor
from miles.train.types import StepResult
from tests.support.models import require_same_files
from tests.support.scenarios import run
from tests.support.streams import config_of, demo_settings, demo_tokenizer
from tests.support.transformers_loss import loss_by_transformers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's rows, a tiny Qwen3 (`hf`) and the same converted (`megatron`)."""
    made = tmp_path_factory.mktemp("train")
    settings = demo_settings(made, batch_size=32, window_rows=384, num_epoch=1)
    (made / "settings.json").write_text(json.dumps(settings))
    # Two tensor-parallel ranks add a row of padding to such a vocabulary.
    sizes = TinySizes(
        vocab_size=2049, hidden_size=64, ffn_hidden_size=128, num_layers=2, kv_channels=16
    )
    build_model(demo_tokenizer(), made / "hf", sizes=sizes)
    hf_to_megatron(str(made / "hf"), str(made / "megatron"))
    return made


def config_in(folder: Path, save: Path, **more: Any) -> TrainConfig:
    settings = json.loads((folder / "settings.json").read_text())
    data = replace(config_of(settings), pack=PackConfig(1, 1024), max_bad_fraction=0.05)
    given = {
        "hf_checkpoint": str(folder / "hf"),
        "ref_load": str(folder / "megatron"),
        "save": str(save),
        "data": data,
        "optimizer": OptimizerSettings(lr=3e-3, min_lr=3e-3, lr_decay_style="constant"),
        "cluster": ClusterConfig(gpus_per_node=2, tensor=2, sequence_parallel=True),
    }
    return TrainConfig(**{**given, **more})


def metrics_of(save: Path) -> list[dict[str, Any]]:
    return lines_of(save / "metrics.jsonl")


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def console() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, width=120, legacy_windows=False), screen


def require_exports_of_ranks(config: TrainConfig, kept: list[int], folder: Path) -> None:
    """Assert that the ranks wrote the exports, each with the bytes of its checkpoint, converted."""
    assert "converted from the checkpoint" not in Path(config.save, "train.log").read_text()
    for done in kept:
        target = folder / f"converted-{done}"
        megatron_to_hf(config.save, config.hf_checkpoint, str(target), iteration=done)
        require_same_files(folder / f"export/{done}", target)


def test_run_evaluates_answers_keeps_and_exports(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = config_in(folder, tmp_path / "run")
    template = "{#- of this run -#}" + CHAT_TEMPLATE.read_text()
    encode = replace(base.data.encode, chat_template=template)
    config = replace(
        base,
        data=replace(base.data, encode=encode, held_out_fraction=0.1),
        num_rollout=7,
        save_interval=2,
        keep_last=2,
        keep_best=1,
        save_hf=str(tmp_path / "export/{rollout_id}"),
        evaluation=EvalConfig(interval=3, num_samples=2, max_response_tokens=6),
        # The rate rises so far that the model is best in between.
        optimizer=OptimizerSettings(lr=3e-1, lr_decay_style="constant", lr_warmup_iters=6),
    )
    out, screen = console()
    summary = train(config, out, ["--said-before is left out"])
    lines = metrics_of(tmp_path / "run")
    evaluated = {line["step"] + 1: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert sorted(evaluated) == [2, 3, 4, 6, 7], "at checkpoints, at the interval, and at the end"
    best = min((2, 4, 6, 7), key=lambda done: evaluated[done])
    assert best in (2, 4), "the test wants a best one that is not among the newest"
    kept = sorted(
        int(path.name.removeprefix("iter_")) for path in (tmp_path / "run").glob("iter_*")
    )
    assert kept == [best, 6, 7]
    assert summary.checkpoint.endswith("iter_0000007")
    assert "evaluation: " in screen.getvalue()
    assert f"eval {evaluated[7]:.4f}" in screen.getvalue()

    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["2", "4", "6", "7"]
    require_exports_of_ranks(config, kept, tmp_path)
    export = tmp_path / "export/7"
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    rows = eval_config(config.data, ())
    assert evaluated[7] == pytest.approx(loss_by_transformers(model, rows), abs=1e-4)
    by_source = {key: value for key, value in lines[-1].items() if key.startswith("eval/loss/")}
    assert by_source.keys() == {"eval/loss/chat", "eval/loss/code"}
    assert min(by_source.values()) < evaluated[7] < max(by_source.values())

    held_out = sum(line.get("data/rows_held_out", 0) for line in lines)
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert 0 < held_out == sum(source["counts"]["held_out"] for source in ledger.values())
    assert ledger["chat"]["columns_not_used"][-2:] == ["id", "source"]
    assert "columns not used: chat: " in screen.getvalue()

    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template == template
    answers = lines_of(tmp_path / "run/eval_samples.jsonl")
    assert [answer["step"] for answer in answers] == [
        done for done in sorted(evaluated) for _ in range(2)
    ]
    for said in answers[-2:]:
        prompt = tokenizer(said["prompt"], add_special_tokens=False, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0][
            prompt["input_ids"].shape[1] :
        ]
        assert said["answer"] == tokenizer.decode(output)
        assert said["expected"].endswith("<|im_end|>")
        assert said["ended"] == said["answer"].endswith("<|im_end|>")

    log = (tmp_path / "run/train.log").read_text().splitlines()
    said = [line[22:].split("  ")[0] for line in log]
    assert said[0] == "--said-before is left out"
    assert said[1] == "no GPU: computing in float32 on the CPU (--bf16: in bfloat16)"
    assert json.loads((tmp_path / "run/config.json").read_text())["bf16"] is False
    assert said[2].startswith("evaluation: ")
    assert said[3] == "7 steps: --num-rollout 7 ends before --num-epoch 1, 21 an epoch x 1"
    assert said[4].endswith("megatron/release")
    assert said.count("checkpoint") == 4
    assert said.count("removed") == 4 - len(kept)
    assert said[-1] == "finished"

    page = Path(write_report(str(tmp_path / "run"))[0]).read_text()
    assert "What it answers after step 7" in page
    assert f"<b>{evaluated[7]:.3f}</b><span>loss, evaluation</span>" in page
    assert f"{ledger['chat']['counts']['held_out']} held out" in page


def test_steps_that_are_not_finite_are_skipped(folder: Path, tmp_path: Path) -> None:
    config = config_in(
        folder,
        tmp_path / "run",
        optimizer=OptimizerSettings(lr=1e30, lr_decay_style="constant"),
        max_skipped_steps=2,
        cluster=ClusterConfig(gpus_per_node=1),
    )
    out, screen = console()

    with pytest.raises(
        DivergedError, match="3 steps in a row were skipped, more than --max-skipped-steps 2"
    ):
        train(config, out)

    skipped = [
        json.loads(line)
        for line in (tmp_path / "run" / run_folder.SKIPPED_STEPS).read_text().splitlines()
    ]
    first = skipped[0]["step"]
    assert [entry["step"] for entry in skipped] == [first, first + 1, first + 2]
    assert {entry["reason"] for entry in skipped} <= {
        "the loss is not finite",
        "the gradient is not finite",
    }
    assert all(Path(row["file"]).exists() for entry in skipped for row in entry["rows"])
    assert all(0 < len(entry["rows"]) <= 32 for entry in skipped)
    assert f"step {first} skipped: " in screen.getvalue()
    assert "  ended: DivergedError: 3 steps in a row" in (tmp_path / "run/train.log").read_text()

    lines = metrics_of(tmp_path / "run")
    assert [line["sft/skipped_steps"] for line in lines] == [*[0] * first, 1, 2]
    assert lines[-1]["sft/skipped"] == skipped[1]["reason"]


def test_refused_export_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    save_hf = "s3://key:secret@bucket/export"
    with pytest.raises(SourceError, match="the URL holds a password"):
        train(config_in(folder, tmp_path / "run", save_hf=save_hf), console()[0])
    assert not (tmp_path / "run").exists()


class SlowActor(TrainerActor):
    """Takes longer for every step, as its environment says, and as long as the queue is not full."""

    def attach_feed(
        self, feed_handle: Any, first_step: int, num_steps: int, ranks_per_node: int
    ) -> None:
        self.feed_handle = feed_handle
        self.next_step = first_step
        self.last_step = num_steps - 1
        super().attach_feed(feed_handle, first_step, num_steps, ranks_per_node)

    def train_step(self) -> StepResult:
        result = super().train_step()
        time.sleep(float(os.environ["SLOW_SECONDS"]))
        ahead = min(self.next_step + StreamConfig.prefetch_steps, self.last_step)
        ray.get(self.feed_handle.fetch.remote(ahead, self.rank, [0]))
        self.next_step += 1
        return result


def test_slow_trainer_never_waits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "TrainerActor", SlowActor)
    out, _ = console()
    cluster = ClusterConfig(gpus_per_node=1, train_env_vars={"SLOW_SECONDS": Secret("0.2")})
    train(config_in(folder, tmp_path / "run", cluster=cluster), out)
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["cluster"]["train_env_vars"] == {"SLOW_SECONDS": "(hidden)"}

    _, *later = metrics_of(tmp_path / "run")
    assert len(later) > 15
    assert min(line["perf/step_seconds"] for line in later) > 0.2
    assert min(line["data/prefetch_queue_depth"] for line in later) > 0
    assert max(line["data/wait_seconds"] for line in later) == 0


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIAWATCHED0000001",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-41c07be2",
    "HF_TOKEN": "hf_watched_9a31ff",
    "WANDB_API_KEY": "5d41402abc4b2a76b9719d911017c592aaaa0001",
}
GIVEN = {"MY_DATABASE_PASSWORD": "given-secret-77e1"}


def test_a_run_listens_on_localhost_and_tells_no_secret(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own ports, the trainers', where they meet, W&B's; every file, also of Ray's session."""
    session = tempfile.mkdtemp(prefix="s-", dir="/tmp")  # Ray's sockets have short names
    monkeypatch.setenv("RAY_TMPDIR", session)
    config = tmp_path / "config.pickle"
    config.write_bytes(pickle.dumps(config_in(folder, tmp_path / "run", num_rollout=3)))
    secrets = tmp_path / "secrets.json"
    secrets.write_text(json.dumps([ENVIRONMENT, GIVEN]))
    seen = run("watched", {"config": str(config), "secrets": str(secrets)})
    assert seen["num_steps"] == 3
    addresses = seen["addresses"]
    assert len(addresses) > 5, "Ray's own, the trainers', and where they meet"
    assert {address.removeprefix("::ffff:") for address, _ in addresses} == {"127.0.0.1"}

    files = [path for root in (tmp_path / "run", Path(session)) for path in root.rglob("*")]
    contents = {path: path.read_bytes() for path in files if path.is_file()}
    assert any(path.name.startswith("events.out") for path in contents), "TensorBoard's"
    assert any(path.suffix == ".wandb" for path in contents), "W&B's"
    assert any(path.suffix == ".log" and "session_" in str(path) for path in contents), "Ray's"
    shutil.rmtree(session)

    told = [json.dumps([seen["printed"], seen["command_lines"]]).encode(), *contents.values()]
    for name, secret in (ENVIRONMENT | GIVEN).items():
        places = [path for path, content in contents.items() if secret.encode() in content]
        assert not places, name
        assert not any(secret.encode() in content for content in told), name
