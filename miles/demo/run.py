"""`miles demo`: the main job, whole, on rows that ship with the package. About a minute and a half on 2 cores.

rows -> tokenizer and tiny Qwen3 -> convert -> prepare -> train on two ranks -> convert back -> compare -> report
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import ray
import torch
from rich.console import Console

from miles.architecture.config import ModelShape
from miles.architecture.families import read_shape
from miles.common import checkpoint_folder, local_ray
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
from miles.data.notebook.dataset import prepare
from miles.demo import rows
from miles.demo.model import build_model
from miles.demo.tokenizer import build_tokenizer
from miles.errors import MilesError
from miles.report.report import verdict, write_report
from miles.report.run_data import read_metrics
from miles.train.config import ClusterConfig, OptimizerSettings, TrainConfig
from miles.train.driver.loop import train
from miles.train.parallel_layout import Layout
from miles.train.rank.actor import TrainerActor
from miles.train.types import RankSetup, StartPoint, TrainerSettings

MAX_SAMPLE_TOKENS = 1024
MAX_DIFFERENCE = 1e-4
"""Between the logits of transformers and of Megatron, float32."""

HELD_OUT = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Why does bread rise in the oven?"},
    {
        "role": "assistant",
        "content": "Its yeast makes gas, and the heat lets the gas grow before the crust sets.",
    },
]


def demo_config(folder: Path) -> TrainConfig:
    """The demo's run, complete: two data-parallel trainers, two sources, eight epochs."""
    return TrainConfig(
        hf_checkpoint=str(folder / "hf"),
        ref_load=str(folder / "megatron"),
        save=str(folder / "checkpoints"),
        output_dir=str(folder),
        data=DataConfig(
            sources=tuple(
                SourceConfig(name, (str(folder / "data" / name),)) for name in rows.FILES
            ),
            order=OrderConfig(batch_size=16, seed=7, shuffle=True, num_epoch=8),
            encode=EncodeConfig(str(folder / "hf"), max_sample_tokens=MAX_SAMPLE_TOKENS),
            pack=PackConfig(dp_size=2, max_tokens_per_gpu=2048),
            stream=StreamConfig(loader_cpus=1, prefetch_steps=8),
        ),
        save_interval=164,
        optimizer=OptimizerSettings(
            lr=3e-3, min_lr=3e-4, lr_decay_style="cosine", lr_warmup_iters=12, weight_decay=0.01
        ),
        cluster=ClusterConfig(gpus_per_node=2),
    )


def run_demo(output: str, console: Console) -> None:
    """Runs the demo into a folder, which is made anew.

    Raises:
        MilesError: the folder holds something else, or a promise of the demo does not hold.
    """
    started = time.monotonic()
    folder = Path(output)
    marker = folder / ".miles-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise MilesError(
            f"{folder}: not empty, and not a demo's folder; name another with --output"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()

    _title(console, 1, "Rows, tokenizer, tiny Qwen3")
    files = rows.copy_rows(folder / "rows")
    build_tokenizer(rows.texts(), folder / "tokenizer")
    build_model(folder / "tokenizer", folder / "hf")
    shape = read_shape(str(folder / "hf"))
    console.print(
        f"  {' and '.join(str(file) for file in files.values())}\n  {folder / 'hf'}: {shape.num_layers} layers, "
        f"hidden {shape.hidden_size}, vocabulary {shape.vocab_size:,}, random weights"
    )

    _title(console, 2, "Convert: Hugging Face -> Megatron")
    console.print(f"  {hf_to_megatron(str(folder / 'hf'), str(folder / 'megatron'))}")

    with local_ray.running(num_cpus=1, object_store_bytes=256 << 20):
        _title(console, 3, "Prepare: ShareGPT -> OpenAI messages")
        for name, file in files.items():
            _prepare(name, file, folder, console)

        _title(console, 4, "Train: Ray Data -> two Megatron trainers")
        summary = train(demo_config(folder), console)

        _title(console, 5, "Convert back, and compare")
        megatron_to_hf(str(folder / "checkpoints"), str(folder / "hf"), str(folder / "export"))
        console.print(f"  {folder / 'export'}")
        _compare(folder, shape, console)

    _title(console, 6, "Report")
    for path in write_report(str(folder), [str(folder / "data" / name) for name in rows.FILES]):
        console.print(f"  {path}")
    console.print(f"  {verdict(read_metrics(str(folder)))}")
    console.print(
        f"\n[bold]loss {summary.first_loss:.3f} -> {summary.last_loss:.3f}[/bold] "
        f"({summary.last_loss / summary.first_loss:.0%} of the start) in {time.monotonic() - started:.0f} s. "
        f"See what the model was fed: miles inspect {folder}"
    )
    if summary.last_loss > 0.6 * summary.first_loss:
        raise MilesError("the demo's loss did not fall below 60 % of its start")


def _title(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}[/bold cyan] [bold]{text}[/bold]")


def _prepare(name: str, file: Path, folder: Path, console: Console) -> None:
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
        f"  {folder / 'data' / name}: {len(summary.lengths)} of {summary.num_rows} rows, "
        f"{int(summary.lengths.sum()):,} tokens, {summary.num_trained_tokens:,} trained"
    )
    for reject in prepared.ledger():
        console.print(
            f"    dropped {Path(str(reject['file'])).name} row {reject['row']}: {reject['reason']}"
        )


def _compare(folder: Path, shape: ModelShape, console: Console) -> None:
    """transformers on the export against Megatron on the checkpoint; then an answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(HELD_OUT, tokenize=True, return_dict=False)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = checkpoint_folder.find(str(folder / "checkpoints"))
    assert found is not None
    actor = ray.remote(num_cpus=0)(TrainerActor).remote(0)
    address = ray.get(actor.listen.remote())
    settings = TrainerSettings(shape, Layout(1), OptimizerSettings(), 1, 1, bf16=False)
    start = StartPoint(found, is_resume=False)
    config = demo_config(folder)
    setup = RankSetup(settings, start, config.seed, config.cluster.timeout_minutes)
    ray.get(actor.setup.remote(address, setup), timeout=120)
    got = ray.get(actor.logits.remote(ids))
    ray.kill(actor)
    difference = float(np.abs(got - expected).max())
    console.print(
        f"  logits of a held-out conversation, {len(ids)} tokens: largest difference {difference:.1e}"
    )
    if not difference < MAX_DIFFERENCE:
        raise MilesError(
            f"the exported model differs from the trained one by {difference}, over {MAX_DIFFERENCE}"
        )
    question = json.loads(rows.lines("chat")[0])["conversations"][0]["value"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    answer = tokenizer.decode(out[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    console.print(
        f"  [dim]asked:[/dim]    {question}\n  [dim]answered:[/dim] {' '.join(answer.split())}"
    )
