"""`miles train` through Ray on a GPU: queue depth, wait, and the share of the time that it trains.

    python benchmarks/gpu_ray.py --json ray.json

A checkpoint of Qwen3-0.6B's shape with random weights, and made-up rows of real lengths, go through
Ray Data to one trainer. Beside it the bare step: the same trainer on a step of the same lengths
that lies ready, without Ray. Without a GPU, a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _gpu_batches import draw_lengths
from _gpu_models import Case
from _gpu_peer import hugging_face_config

from miles.demo import rows
from miles.demo.tokenizer import build_tokenizer
from miles.train.model import device

ON_GPU = Case("qwen3-0.6b", 9_216)
ON_CPU = Case("tiny", 1_024)
CHARACTERS_OF_TOKEN = 2.5
"""The demo's tokenizer on its own texts has about as many."""
FIRST_STEPS = 4
"""Steps that do not count: kernels are compiled and buffers are filled."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows-of-step", type=int, help="default: 448 on a GPU, else 16")
    parser.add_argument("--budget", type=float, default=120, help="seconds of the whole")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()

    has_gpu = device.has_gpu()
    case = ON_GPU if has_gpu else ON_CPU
    rows_of_step = flags.rows_of_step or (448 if has_gpu else 16)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="miles-gpu-ray-") as folder:
        write_inputs(Path(folder), case, flags.steps * rows_of_step)
        prepared = time.monotonic() - started
        lines = train(Path(folder), case, flags.steps, rows_of_step)
        trained = time.monotonic() - started - prepared
        seconds = f"{prepared:.0f} to make the inputs, {trained:.0f} of the command"
        # At once: the bare step may not end in time.
        write(lines, None, seconds, flags.json)

        left = flags.budget - (time.monotonic() - started)
        bare = bare_step(Path(folder), case, lines) if left > 20 or not has_gpu else None
        for name, value in write(lines, bare, seconds, flags.json).items():
            print(f"{name}: {value}")


def write(
    lines: list[dict[str, Any]], bare: dict[str, Any] | None, seconds: str, path: Path | None
) -> dict[str, Any]:
    """Write the figures of a run and of the bare step, if there is one; return those to show."""
    found = figures(lines, bare)
    found["shown"]["seconds"] = seconds
    if path is not None:
        path.write_text(json.dumps(found, indent=1))
    shown: dict[str, Any] = found["shown"]
    return shown


def write_inputs(folder: Path, case: Case, num_rows: int) -> None:
    """Write a checkpoint with random weights and the demo's tokenizer, and rows."""
    from transformers import AutoModelForCausalLM

    build_tokenizer(rows.texts(), folder / "hf")
    torch.manual_seed(5)
    with torch.device(device.torch_device()):
        model = AutoModelForCausalLM.from_config(
            hugging_face_config(case.shape), dtype=torch.bfloat16
        )
    model.save_pretrained(folder / "hf")

    rng = np.random.default_rng(11)
    text = " ".join(rows.texts())
    conversations = []
    for length in draw_lengths(num_rows, case.num_tokens // 2, rng):
        half = max(int(length * CHARACTERS_OF_TOKEN) // 2, 4)
        start = int(rng.integers(0, len(text) - 2 * half))
        question, answer = text[start : start + half], text[start + half : start + 2 * half]
        conversations.append(
            [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        )
    pq.write_table(
        pa.table({"conversations": conversations}), folder / "rows.parquet", row_group_size=1_000
    )


def train(folder: Path, case: Case, num_steps: int, rows_of_step: int) -> list[dict[str, Any]]:
    """Run `miles train`; return the lines of its metrics."""
    options: dict[str, Any] = {
        "hf-checkpoint": folder / "hf",
        "save": folder / "run",
        "num-rollout": num_steps,
        "rollout-batch-size": rows_of_step,
        "max-tokens-per-gpu": case.num_tokens,
        "lr": 1e-5,
        "actor-num-gpus-per-node": 1,
    }
    words = [sys.executable, "-m", "miles.cli", "train"]
    words += ["--prompt-data", "rows", str(folder / "rows.parquet")]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    subprocess.run(words, check=True)
    metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in metrics]


def bare_step(folder: Path, case: Case, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Time the bare step, with about as many micro-batches as the run had."""
    tokens = statistics.median(line["data/num_tokens"] for line in lines)
    number = max(round(tokens / case.num_tokens), 1)
    report = folder / "bare.json"
    words = [sys.executable, Path(__file__).with_name("gpu_train.py"), "--json", report]
    words += ["--model", case.model, "--tokens", str(case.num_tokens), "--steps", "5"]
    words += ["--micro-batches", str(number), "--section", "step"]
    subprocess.run(words, check=True)
    step: dict[str, Any] = json.loads(report.read_text())["step"]
    return None if "error" in step else step


def figures(lines: list[dict[str, Any]], bare: dict[str, Any] | None) -> dict[str, Any]:
    """Return the figures of a run's later steps: as numbers, and as they are shown."""
    later = lines[FIRST_STEPS:] or lines
    step, trained, wait = (
        sum(line[key] for line in later)
        for key in ("perf/step_seconds", "perf/train_seconds", "data/wait_seconds")
    )
    tokens = sum(line["data/num_tokens"] for line in later)
    depths = [line["data/prefetch_queue_depth"] for line in later]
    losses = [line["sft/loss"] for line in lines]

    numbers = {
        "steps": len(later),
        "tokens_per_second": tokens / step,
        "tokens_per_second_of_trainer": tokens / trained,
        "share_trained": trained / step,
        "wait_seconds": wait,
        "least_queue_depth": min(depths),
        "median_queue_depth": statistics.median(depths),
        "bare_tokens_per_second": None if bare is None else bare["tokens_per_second"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mfu": later[-1].get("perf/mfu"),
    }

    shown = {
        "device of the run": "GPU" if numbers["mfu"] is not None else "CPU, or an unknown GPU",
        "steps that count, micro-batches' tokens": f"{len(later)}, {tokens:,}",
        "tokens/s, end to end": f"{tokens / step:,.0f}",
        "tokens/s in the trainer": f"{tokens / trained:,.0f}",
        "share of the time in the trainer": f"{trained / step:.1%}",
        "wait for data": f"{wait:.3f} s of {step:.1f} s",
        "steps ready": f"median {numbers['median_queue_depth']:g}, least {min(depths)}",
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}",
    }
    if bare is not None:
        speed = bare["tokens_per_second"]
        shown["tokens/s of the bare step"] = f"{speed:,.0f}"
        shown["end to end / bare step"] = f"{tokens / step / speed:.1%}"
    return {"numbers": numbers, "shown": shown, "lines": lines}


if __name__ == "__main__":
    main()
