"""A LoRA run of the demo's model: from rows to an adapter that peft loads, with a kill on the way."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from miles.convert.megatron_to_hf import megatron_to_hf
from miles.data.stream.eval_rows import eval_config
from miles.report.report import write_report
from miles.train.config import TrainConfig
from miles.train.driver import group
from miles.train.driver.loop import train
from miles.train.launch.arguments import parse
from miles.train.rank.actor import TrainerActor
from miles.train.types import StepResult
from tests.support.commands import Workspace
from tests.support.models import require_same_files
from tests.support.processes import unforked, wait_until
from tests.support.runs import SAVE_INTERVAL, fingerprints, lines, numbers, tracked
from tests.support.transformers_loss import loss_by_transformers

pytestmark = pytest.mark.slow
NUM_STEPS = 12
LORA = {
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": "q_proj,v_proj,linear_fc1,down_proj",
    "eval_fraction": 0.1,
    "eval_interval": 5,
    "keep_last": 1,
    "deterministic_mode": None,
    "actor_num_gpus_per_node": 1,
    "num_rollout": NUM_STEPS,
}


class SlowActor(TrainerActor):
    """Takes so long for a step that it can be killed at the one that is meant."""

    def train_step(self) -> StepResult:
        time.sleep(0.1)
        return super().train_step()


def settings(workspace: Workspace, save: Path, **more: Any) -> TrainConfig:
    words = workspace.words(save, save_hf=save / "export", **{**LORA, **more})
    return parse(words[4:])


def run(config: TrainConfig) -> str:
    """Train; return what was printed."""
    screen = io.StringIO()
    train(config, Console(file=screen, width=400))
    return screen.getvalue()


def test_a_lora_run_goes_on_after_a_kill(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed, and started again. Its base comes in another format than the unbroken one's."""
    unbroken, save = tmp_path / "unbroken", tmp_path / "run"
    config = settings(workspace, unbroken)
    run(config)
    require_adapter_of_peft(workspace, config)

    def kill() -> None:
        wait_until(lambda: len(lines(save)) > SAVE_INTERVAL and tracked(save) >= SAVE_INTERVAL)
        unforked("ray::SlowActor")[-1].send_signal(signal.SIGKILL)

    monkeypatch.setattr(group, "TrainerActor", SlowActor)
    killer = threading.Thread(target=kill)
    killer.start()
    printed = run(settings(workspace, save, ref_load=None))
    killer.join()
    assert "starting again from the last complete checkpoint" in printed
    assert f"weights of {workspace.folder}/hf and the adapter of {save}/iter_000000" in printed
    starts = [entry.get("start") for entry in lines(save, "starts.jsonl")]
    assert starts == [1, None, 2, None]

    assert fingerprints(save) == fingerprints(unbroken)
    assert numbers(save) == numbers(unbroken)
    for own, other in zip(lines(save), lines(unbroken), strict=True):
        assert own.get("eval/loss") == other.get("eval/loss")
    require_same_files(save / "export", unbroken / "export")
    assert [path.name for path in save.glob("iter_*")] == [f"iter_00000{NUM_STEPS}"]


def require_adapter_of_peft(workspace: Workspace, config: TrainConfig) -> None:
    """Assert that a run's export is an adapter that evaluates in peft as it did in the run."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run_dir, hf = Path(config.save), workspace.folder / "hf"
    export = run_dir / "export"
    assert "converted from the checkpoint" not in (run_dir / "train.log").read_text()
    megatron_to_hf(config.save, str(hf), str(run_dir / "converted"))
    require_same_files(export, run_dir / "converted")

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    rows = eval_config(config.data, ())
    before = loss_by_transformers(model, rows)
    adapted = PeftModel.from_pretrained(model, export).eval()
    after = lines(run_dir)[-1]["eval/loss"]
    assert after == pytest.approx(loss_by_transformers(adapted, rows), abs=1e-4)
    assert after < before - 0.01, "it has learned"

    saved = json.loads((run_dir / f"iter_00000{NUM_STEPS}/miles.json").read_text())
    assert saved["adapter"]["targets"] == [
        "q_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert saved["base"]["url"] == f"{workspace.folder}/megatron/release"
    page = Path(write_report(str(run_dir))[0]).read_text()
    assert "Traceback" not in page
