"""The precision of a run that resumes: its checkpoint's, unless the line asks for another."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from miles.common import run_folder
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.errors import ClusterError
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.driver.cluster import ray_cluster, settle_device
from miles.train.driver.run_log import RunLog
from miles.train.precision import Precision
from miles.train.types import StartPoint

BF16, FP16, FP32 = Precision.BF16, Precision.FP16, Precision.FP32
CHANGES = "computing in {} from here on; the checkpoint was trained in {} ({} keeps that)"


def settled(
    save: Path, extra: dict[str, Any], *, gpus: bool, is_resume: bool = True, **asked: bool
) -> tuple[Precision | None, str]:
    """Return the precision of a run from a checkpoint in `save`, and what the run reports."""
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    config = TrainConfig("hf", None, str(save), data, **asked)  # type: ignore[arg-type]
    start = StartPoint(SavedCheckpoint(f"{save}/iter_0000004", 4, extra), is_resume)
    screen = io.StringIO()
    with RunLog(str(save), Console(file=screen, width=200)) as run_log:
        config = settle_device(config, run_log, start, has_gpus=gpus)
    return config.precision, screen.getvalue().strip()


def test_a_wait_for_ray_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    cluster = ClusterConfig(ray_address="127.0.0.1:1")
    config = TrainConfig("hf", None, str(tmp_path), data, cluster=cluster)
    said: list[str] = []
    with pytest.raises(ClusterError), ray_cluster(config, said.append):
        pass
    assert said == ["joining Ray at 127.0.0.1:1"]


@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize("kept", [BF16, FP16, FP32])
def test_the_same_command_stays_in_the_precision(
    tmp_path: Path, kept: Precision, gpus: bool
) -> None:
    precision, said = settled(tmp_path, {"precision": kept.value}, gpus=gpus)
    assert precision is kept
    default = BF16 if gpus else FP32
    if kept is not default:
        assert f"computing in {kept}, as the checkpoint was trained ({default.flag}: in " in said
    else:
        assert said == "" if gpus else "no GPU: computing in float32" in said


@pytest.mark.parametrize(
    ("asked", "kept", "precision"),
    [({"bf16": True}, FP32, BF16), ({"bf16": False}, BF16, FP32), ({"fp16": True}, BF16, FP16)],
)
def test_a_change_is_made_and_said(
    tmp_path: Path, asked: dict[str, bool], kept: Precision, precision: Precision
) -> None:
    found, said = settled(tmp_path, {"precision": kept.value}, gpus=True, **asked)
    assert found is precision
    assert CHANGES.format(precision, kept, kept.flag) in said


def test_the_same_precision_is_not_mentioned(tmp_path: Path) -> None:
    extra = {"precision": "bfloat16"}
    assert settled(tmp_path, extra, gpus=False, bf16=True) == (BF16, "")


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ('{"bf16": false}', FP32),
        ('{"bf16": true, "fp16": false}', BF16),
        ('{"bf16": null, "fp16": true}', FP16),
    ],
)
def test_an_older_checkpoint_is_in_the_precision_of_its_settings(
    tmp_path: Path, settings: str, precision: Precision
) -> None:
    (tmp_path / run_folder.CONFIG).write_text(settings)
    assert settled(tmp_path, {}, gpus=True)[0] is precision
    if precision is FP32:
        found, said = settled(tmp_path, {}, gpus=True, bf16=True)
        assert (found, CHANGES.format(BF16, FP32, "--no-bf16") in said) == (BF16, True)


@pytest.mark.parametrize("settings", [None, '{"model_type": "qwen3"}', "[]", "{"])
def test_where_nothing_is_known_the_device_chooses(tmp_path: Path, settings: str | None) -> None:
    if settings is not None:
        (tmp_path / run_folder.CONFIG).write_text(settings)
    precision, said = settled(tmp_path, {"precision": "int3"}, gpus=True)
    assert precision is BF16
    assert "the checkpoint does not say what it was trained in (--no-bf16: in float32)" in said


def test_weights_alone_say_nothing(tmp_path: Path) -> None:
    (tmp_path / run_folder.CONFIG).write_text(json.dumps({"bf16": False}))
    extra = {"precision": "float32"}
    assert settled(tmp_path, extra, gpus=True, is_resume=False) == (BF16, "")
