"""Which checkpoints are exported, where to, and by whom: the ranks, or the driver after them.

Two pretended ranks write real files. A conversion by the driver is only noted.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from miles.architecture.families import hf_shapes, pieces_of, read_shape
from miles.common.atomic_folders import StagedFolder
from miles.convert import megatron_to_hf
from miles.convert.box_writer import BoxWriter
from miles.convert.hf_boxes import open_weights
from miles.convert.safetensors_files import ShardedWriter, Spec, index_text, split_into_files
from miles.convert.safetensors_headers import INDEX, SINGLE
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.errors import CheckpointError, LostError, MilesError, RunError
from miles.train.config import TrainConfig
from miles.train.driver.export import Exporter, export_if_missing, remove_unfinished
from miles.train.driver.run_log import RunLog
from miles.train.types import ExportPart, SaveFailure
from tests.support.launch import QWEN3_MOE
from tests.support.models import require_same_files

TEMPLATE = "{{ messages }}"
NUM_STEPS = 10


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model in several files, with the template that runs train with."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(QWEN3_MOE))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shapes = hf_shapes(read_shape(str(folder)))
    specs = {name: Spec(torch.bfloat16, sizes) for name, sizes in shapes.items()}

    files = split_into_files(specs, max_file_bytes=100_000)
    assert len(set(files.values())) > 2
    (folder / INDEX).write_text(index_text(specs, files))
    writer = ShardedWriter(folder, specs, files)
    generator = torch.Generator().manual_seed(1)
    for name, spec in specs.items():
        writer.write(name, torch.randn(spec.shape, dtype=spec.dtype, generator=generator))
    writer.close()
    return str(folder)


class PretendedGroup:
    """Two ranks that hold the weights of a Hugging Face folder in turn."""

    def __init__(self, hf: str) -> None:
        self.hf = hf
        self.blind: list[str] = []
        self.failure: SaveFailure | None = None
        self.error: MilesError | None = None
        self.num_left_out = 0

    def nodes_without(self, url: str) -> list[str]:
        return self.blind

    def write_export(self, folder: str) -> list[ExportPart]:
        if self.error is not None:
            raise self.error

        shape = read_shape(self.hf)
        tensors = open_weights(self.hf, shape)
        num_bytes = [0, 0]
        for number, (parameter, place) in enumerate(pieces_of(shape)[self.num_left_out :]):
            values = torch.empty(parameter.shape)
            offsets = [0] * values.dim()
            tensors.read(parameter.megatron, place, offsets, values)

            writer = BoxWriter(Path(folder), shape)
            num_bytes[number % 2] += writer.write(parameter.megatron, place, offsets, values)
            writer.close()
        return [ExportPart(num_bytes[0]), ExportPart(num_bytes[1], self.failure)]


class Bench:
    """An exporter over a pretended group."""

    def __init__(self, folder: Path, hf: str, save_hf: str | None) -> None:
        encode = EncodeConfig(hf, TEMPLATE)
        data = DataConfig((SourceConfig("chat", ("chat.jsonl",)),), OrderConfig(), encode)
        save = folder / "run"
        save.mkdir(exist_ok=True)
        self.config = TrainConfig(hf, None, str(save), data, save_hf=save_hf, bf16=True)
        self.group = PretendedGroup(hf)
        self.run_log = RunLog(str(folder), Console(file=io.StringIO()))
        self.exporter = Exporter(
            self.config, read_shape(hf), cast(Any, self.group), self.run_log, NUM_STEPS
        )

    def export(self, iteration: int) -> None:
        self.exporter.begin(iteration)
        self.exporter.finish(f"run/{iteration}", iteration)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(checkpoint, target) of each conversion."""
    noted: list[tuple[str, str]] = []

    def convert(load: str, hf_checkpoint: str, save: str, *, chat_template: str | None) -> str:
        assert chat_template == TEMPLATE
        noted.append((load, save))
        return save

    monkeypatch.setattr(megatron_to_hf, "megatron_to_hf", convert)
    return noted


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.converting"))


@pytest.mark.parametrize(
    ("save_hf", "exported"),
    [(None, []), ("export", ["export"]), ("{rollout_id}/hf", ["10/hf", "4/hf", "8/hf"])],
)
def test_ranks_write_the_last_export_or_each(
    hf: str, converted: Any, tmp_path: Path, save_hf: str | None, exported: list[str]
) -> None:
    bench = Bench(tmp_path, hf, save_hf and str(tmp_path / save_hf))
    for iteration in (4, 8, NUM_STEPS):
        bench.export(iteration)

    folders = sorted(path.parent for path in tmp_path.rglob("config.json"))
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == exported
    for folder in folders:
        require_same_files(Path(hf), folder)
    assert converted == []
    assert not hidden(tmp_path)


def test_an_export_appears_with_its_checkpoint(hf: str, converted: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, hf, str(tmp_path / "{rollout_id}"))
    bench.exporter.begin(4)
    assert not (tmp_path / "4").exists()
    assert hidden(tmp_path)

    bench.exporter.abandon()
    assert not hidden(tmp_path)
    bench.export(8)
    assert (tmp_path / "8/config.json").exists()
    assert converted == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blind": ["node-2"]}, "is not the same folder on node-2"),
        ({"failure": SaveFailure("no space left on device")}, "no space left on device"),
        ({"num_left_out": 1}, "the ranks wrote "),
    ],
    ids=["unshared", "full", "incomplete"],
)
def test_what_the_ranks_cannot_write_is_converted(
    hf: str, converted: list[tuple[str, str]], tmp_path: Path, change: Any, reason: str
) -> None:
    bench = Bench(tmp_path, hf, str(tmp_path / "export"))
    vars(bench.group).update(change)
    bench.export(NUM_STEPS)
    assert converted == [(f"run/{NUM_STEPS}", f"{tmp_path}/export")]
    assert not hidden(tmp_path)
    assert not (tmp_path / "export").exists()
    bench.run_log.flush()
    assert reason in (tmp_path / "train.log").read_text()


def test_other_files_are_not_replaced(hf: str, converted: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, hf, str(tmp_path / "{rollout_id}"))
    (tmp_path / "4").mkdir()
    (tmp_path / "4/notes.txt").touch()
    bench.export(4)
    assert converted == [("run/4", f"{tmp_path}/4")], "and that refuses the folder"

    bench.exporter.begin(8)
    (tmp_path / "8").mkdir()
    (tmp_path / "8/notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"8: holds notes\.txt, which no conversion"):
        bench.exporter.finish("run/8", 8)
    assert (tmp_path / "8/notes.txt").exists()
    assert not hidden(tmp_path)


def test_a_store_gets_the_converted_checkpoint(
    hf: str, converted: list[tuple[str, str]], tmp_path: Path
) -> None:
    bench = Bench(tmp_path, hf, f"memory://{tmp_path.name}/export")
    bench.export(NUM_STEPS)
    assert converted == [(f"run/{NUM_STEPS}", f"memory://{tmp_path.name}/export")]


@pytest.mark.parametrize("error", [LostError("trainer 1 died"), RunError("trainer 1 failed")])
def test_a_lost_rank_leaves_nothing(
    hf: str, converted: Any, tmp_path: Path, error: MilesError
) -> None:
    bench = Bench(tmp_path, hf, str(tmp_path / "export"))
    bench.group.error = error
    with pytest.raises(type(error), match="trainer 1"):
        bench.exporter.begin(NUM_STEPS)
    assert not hidden(tmp_path)


def test_leavings_of_a_killed_run_are_removed(hf: str, tmp_path: Path) -> None:
    for name in (".4.converting", ".8.converting"):
        (tmp_path / "export" / name).mkdir(parents=True)
        (tmp_path / "export" / name / SINGLE).touch()
    (tmp_path / "export/.mine").mkdir()
    busy = StagedFolder(tmp_path / "export/12")

    config = Bench(tmp_path, hf, str(tmp_path / "export/{rollout_id}")).config
    assert len(remove_unfinished(config)) == 2
    left = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert left == [".12.converting", ".mine"]
    busy.discard()


def test_a_missing_export_is_made_up_for(
    hf: str, converted: list[tuple[str, str]], tmp_path: Path
) -> None:
    bench = Bench(tmp_path, hf, f"{tmp_path}/export/{{rollout_id}}")
    target = tmp_path / "export/10"
    export_if_missing(bench.config, "run/10", 10, bench.run_log)
    assert converted == [("run/10", str(target))]

    target.mkdir(parents=True)
    (target / "config.json").touch()
    export_if_missing(bench.config, "run/10", 10, bench.run_log)
    export_if_missing(Bench(tmp_path, hf, None).config, "run/10", 10, bench.run_log)
    assert len(converted) == 1
