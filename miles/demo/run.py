"""`miles demo`: the main job from end to end.

rows -> tokenizer and tiny Qwen3 -> convert -> prepare -> train -> convert back
    -> compare -> report
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import ray
from rich.console import Console
from rich.text import Text

from miles.architecture.families import read_shape
from miles.common import local_ray, storage
from miles.common.counts import counted
from miles.common.prose import Prose
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    SourceConfig,
    StreamConfig,
)
from miles.data.notebook.prepare import prepare
from miles.demo import rows
from miles.demo.compare import compare_export
from miles.demo.model import build_model
from miles.demo.tokenizer import build_tokenizer
from miles.errors import ConfigError, MilesError, WriteError
from miles.report.report import verdict, write_report
from miles.report.run_data import read_metrics
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.driver.loop import train
from miles.train.model import device
from miles.train.optimizer_settings import OptimizerSettings

MAX_SAMPLE_TOKENS = 1024
MAX_TRAINERS = 2
MAX_LAST_LOSS = 0.6
"""The last step's loss must be below this share of the first step's."""

_MARKER = ".miles-demo"
"""File in a folder that the demo may delete."""


def demo_config(folder: Path, num_trainers: int) -> TrainConfig:
    """Return the demo's run: data-parallel trainers, two sources, eight epochs."""
    sources = [SourceConfig(name, (str(folder / "data" / name),)) for name in rows.FILES]
    data = DataConfig(
        sources=tuple(sources),
        order=OrderConfig(batch_size=16, seed=7, shuffle=True, num_epoch=8),
        encode=EncodeConfig(str(folder / "hf"), max_sample_tokens=MAX_SAMPLE_TOKENS),
        pack=PackConfig(dp_size=num_trainers, max_tokens_per_gpu=2048),
        stream=StreamConfig(loader_cpus=1, prefetch_steps=8),
    )
    optimizer = OptimizerSettings(
        lr=3e-3, min_lr=3e-4, lr_decay_style="cosine", lr_warmup_iters=12, weight_decay=0.01
    )

    return TrainConfig(
        hf_checkpoint=str(folder / "hf"),
        ref_load=str(folder / "megatron"),
        save=str(folder / "checkpoints"),
        output_dir=str(folder),
        data=data,
        save_interval=164,
        optimizer=optimizer,
        cluster=ClusterConfig(gpus_per_node=num_trainers),
    )


def run_demo(output: str, console: Console) -> None:
    """Run the demo into a folder. The files of an earlier demo there are deleted.

    Raises:
        MilesError: the folder holds something else, or a promise of the demo does not hold.
    """
    if not storage.is_local(output):
        raise ConfigError(f"--output {output}: the demo writes to this machine; name a folder")
    started = time.monotonic()
    folder = Path(output)
    _clear(folder)

    _title(console, 1, "Rows, tokenizer, tiny Qwen3")
    files = _build_inputs(folder, console)

    _title(console, 2, "Convert: Hugging Face -> Megatron")
    console.print(f"  {hf_to_megatron(str(folder / 'hf'), str(folder / 'megatron'))}")

    # Each trainer on a GPU takes a CPU beside the loader; those on CPUs reserve none.
    num_cpus = None if device.has_gpu() else 1
    with local_ray.running(num_cpus, object_store_bytes=256 << 20):
        _title(console, 3, "Prepare: ShareGPT -> OpenAI messages")
        for name, file in files.items():
            _prepare(name, file, folder, console)

        num_trainers = _num_trainers()
        _title(
            console,
            4,
            f"Train: Ray Data -> {counted(num_trainers, 'Megatron trainer')}",
        )
        summary = train(demo_config(folder, num_trainers), console)

        _title(console, 5, "Convert back, and compare")
        megatron_to_hf(str(folder / "checkpoints"), str(folder / "hf"), str(folder / "export"))
        console.print(f"  {folder / 'export'}")
        compare_export(folder, console)

    _title(console, 6, "Report")
    for path in write_report(str(folder), [str(folder / "data" / name) for name in rows.FILES]):
        console.print(f"  {path}", soft_wrap=True)
    console.print(Prose(f"  {verdict(read_metrics(str(folder)))}"), soft_wrap=True)

    share = summary.last_loss / summary.first_loss
    fall = f"loss {summary.first_loss:.3f} -> {summary.last_loss:.3f}"
    rest = f" ({share:.0%} of the start) in {time.monotonic() - started:.0f} s"
    console.print(Text.assemble("\n", (fall, "bold"), rest))
    console.print(f"To see the first batch: miles inspect {folder}", soft_wrap=True)
    if share > MAX_LAST_LOSS:
        raise MilesError(f"the demo's loss did not fall below {MAX_LAST_LOSS:.0%} of its start")


def _num_trainers() -> int:
    """Return two, or as many as there are GPUs where that is fewer. Ray must run."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    return min(num_gpus or MAX_TRAINERS, MAX_TRAINERS)


def _clear(folder: Path) -> None:
    """Create an empty folder, in place of an earlier demo's.

    Raises:
        MilesError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise WriteError(f"{folder}: a file, not a folder; name another with --output")
    has_files = folder.exists() and any(folder.iterdir())
    if has_files and not (folder / _MARKER).exists():
        raise MilesError(
            f"{folder}: not empty, and not a demo's folder; name another with --output"
        )
    with storage.writing(str(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / _MARKER).touch()


def _build_inputs(folder: Path, console: Console) -> dict[str, Path]:
    """Make rows, tokenizer and model.

    Returns:
        name of the source -> its file.
    """
    files = rows.copy_rows(folder / "rows")
    build_tokenizer(rows.texts(), folder / "tokenizer")
    build_model(folder / "tokenizer", folder / "hf")
    shape = read_shape(str(folder / "hf"))

    for file in files.values():
        console.print(f"  {file}", soft_wrap=True)
    console.print(
        Prose(
            f"  {folder / 'hf'}: {shape.num_layers} layers, hidden size {shape.hidden_size}, "
            f"vocabulary {shape.vocab_size:,}, random weights"
        ),
        soft_wrap=True,
    )
    return files


def _prepare(name: str, file: Path, folder: Path, console: Console) -> None:
    """Prepare one source, and print its counts and its dropped rows."""
    prepared = prepare(
        name,
        source=str(file),
        tokenizer=str(folder / "hf"),
        max_sample_tokens=MAX_SAMPLE_TOKENS,
        max_bad_fraction=0.02,
    )
    prepared.write(str(folder / "data" / name))

    summary = prepared.summary()
    console.print(
        Prose(
            f"  {folder / 'data' / name}: {len(summary.lengths)} of {summary.num_rows} rows, "
            f"{int(summary.lengths.sum()):,} tokens, {summary.num_trained_tokens:,} trained"
        ),
        soft_wrap=True,
    )
    for reject in prepared.ledger():
        file_name = Path(str(reject["file"])).name
        console.print(f"    dropped {file_name} row {reject['row']}: {reject['reason']}")


def _title(console: Console, number: int, text: str) -> None:
    console.print(Text.assemble("\n", (str(number), "bold cyan"), " ", (text, "bold")))
