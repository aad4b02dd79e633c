"""Which checkpoints are exported, and to where; the conversion itself is only noted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from miles.convert import megatron_to_hf
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.train.config import TrainConfig
from miles.train.driver.export import export_checkpoint, export_if_missing
from miles.train.driver.run_log import RunLog

TEMPLATE = "{{ messages }}"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(checkpoint, target) of each conversion."""
    noted: list[tuple[str, str]] = []

    def convert(load: str, hf_checkpoint: str, save: str, *, chat_template: str | None) -> str:
        assert chat_template == TEMPLATE
        noted.append((load, save))
        return save

    monkeypatch.setattr(megatron_to_hf, "megatron_to_hf", convert)
    return noted


def config_of(save_hf: str | None) -> TrainConfig:
    encode = EncodeConfig("hf", TEMPLATE)
    data = DataConfig((SourceConfig("chat", ("chat.jsonl",)),), OrderConfig(), encode)
    return TrainConfig("hf", "megatron", "run", data, save_hf=save_hf)


@pytest.fixture
def run_log(tmp_path: Path) -> RunLog:
    return RunLog(str(tmp_path), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("save_hf", "targets"),
    [
        (None, []),
        ("export", ["export"]),
        ("export/{rollout_id}", ["export/4", "export/8", "export/10"]),
    ],
)
def test_the_last_checkpoint_or_each_is_exported(
    exported: list[tuple[str, str]], run_log: RunLog, save_hf: str | None, targets: list[str]
) -> None:
    for iteration in (4, 8, 10):
        export_checkpoint(
            config_of(save_hf), f"run/{iteration}", iteration, run_log, is_last=iteration == 10
        )
    assert [target for _, target in exported] == targets
    assert [load for load, _ in exported[-1:]] == ["run/10"] * bool(targets)


def test_a_missing_export_is_made_up_for(
    exported: list[tuple[str, str]], run_log: RunLog, tmp_path: Path
) -> None:
    config = config_of(f"{tmp_path}/export/{{rollout_id}}")
    target = tmp_path / "export/10"
    export_if_missing(config, "run/10", 10, run_log)
    assert exported == [("run/10", str(target))]

    target.mkdir(parents=True)
    (target / "config.json").touch()
    export_if_missing(config, "run/10", 10, run_log)
    export_if_missing(config_of(None), "run/10", 10, run_log)
    assert len(exported) == 1
