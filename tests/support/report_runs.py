"""A run's folder with all that a report can show, made up."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from miles.common import run_folder
from tests.support.metrics_lines import write_lines

_STAGES = ("read", "normalize", "encode", "pack")
_RESUMED_AT = 0.55
_STALLED = (0.3, 0.32)
_SKIPPED = 0.42


def line_of(step: int, num_steps: int, draw: random.Random) -> dict[str, Any]:
    """Return the metrics of a step: a loss that falls, a stall, a skipped step, evaluations."""
    part = step / num_steps
    loss = 1.1 + 2.4 * math.exp(-4 * part) + draw.gauss(0, 0.06)
    is_stalled = _STALLED[0] <= part < _STALLED[1] and step > 0
    is_skipped = step == int(num_steps * _SKIPPED)
    wait = 1.8 + draw.random() if is_stalled else 0.0
    seconds = 2.0 + 0.1 * draw.random() + wait
    tokens = 30_000 + draw.randrange(4_000)
    line: dict[str, Any] = {
        "step": step,
        "sft/loss": None if is_skipped else loss,
        "sft/loss/chat": loss - 0.15,
        "sft/loss/code": loss + 0.3 + draw.gauss(0, 0.05),
        "sft/tokens_seen": 18_000 * (step + 1),
        "sft/epoch": round(3 * (step + 1) / num_steps, 4),
        "sft/grad_norm": 0.8 + 3 * math.exp(-9 * part) + 0.2 * draw.random(),
        "sft/lr": 2e-5 * min(1, (step + 1) / (num_steps / 20)) * (1 + math.cos(math.pi * part)) / 2,
        "sft/skipped_steps": int(step >= int(num_steps * _SKIPPED)),
        "data/prefetch_queue_depth": 0 if is_stalled else min(8, 2 + step),
        "data/wait_seconds": wait,
        "data/num_rows": 64,
        "data/num_samples": 63,
        "data/num_tokens": tokens,
        "data/pack_fill": 0.93 + 0.03 * draw.random(),
        "data/dp_imbalance": 1 + 0.02 * draw.random(),
        "perf/step_seconds": seconds,
        "perf/train_seconds": seconds - wait - 0.05,
        "perf/tokens_per_second": tokens / seconds,
        "perf/mfu": 0.46 * 2 / seconds,
        "perf/tflops_per_gpu": 455 * 2 / seconds,
    }
    for stage in _STAGES:
        line[f"data/{stage}_seconds"] = 3.4 if is_stalled and stage == "encode" else 0.2
    if is_skipped:
        line["sft/skipped"] = "the loss is not finite"
    if (step + 1) % max(num_steps // 12, 1) == 0:
        line["eval/loss"] = loss + 0.1
        line["eval/loss/chat"] = loss
        line["eval/loss/code"] = loss + 0.35
        line["eval/seconds"] = 21.0
    return line


def lines_of(num_steps: int, seed: int = 5) -> list[dict[str, Any]]:
    """Return the metrics of a run."""
    draw = random.Random(seed)
    return [line_of(step, num_steps, draw) for step in range(num_steps)]


def write_full_run(folder: Path, num_steps: int = 600, tokenizer: Any = None) -> Path:
    """Write the folder of a run with evaluations, a stall, a skipped step, a restart, answers.

    Args:
        folder: to write; it may be there.
        num_steps: of the run.
        tokenizer: of the samples of the first batch; None: the run kept none.

    Returns:
        the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / run_folder.METRICS, lines_of(num_steps))
    _write_starts(folder, num_steps)
    _write_answers(folder, num_steps)
    _write_account(folder, num_steps)
    settings = {
        "hf_checkpoint": "Qwen3-4B",
        "save": "s3://bucket/runs/chat-4b",
        "save_interval": 100,
        "data": {
            "order": {"batch_size": 64, "shuffle": True},
            "pack": {"max_tokens_per_gpu": 8192},
        },
        "optimizer": {"lr": 2e-5, "lr_decay_style": "cosine", "weight_decay": 0.01},
        "cluster": {"gpus_per_node": 8},
        "evaluation": {"interval": 50, "num_samples": 2},
        "bf16": True,
    }
    (folder / run_folder.CONFIG).write_text(json.dumps(settings))
    if tokenizer is not None:
        _write_first_batch(folder, tokenizer)
    return folder


def _write_starts(folder: Path, num_steps: int) -> None:
    surroundings = {
        "world_size": 8,
        "tensor": 2,
        "pipeline": 1,
        "data": 4,
        "expert": 1,
        "precision": "bfloat16",
        "miles": "0.1.0",
        "model": {"family": "qwen3", "parameters": 4_022_468_096, "layers": 36},
        "hardware": {
            "gpu": "NVIDIA H100 80GB HBM3",
            "cpu": "AMD EPYC 9654",
            "cpus": 192,
            "memory_bytes": 1 << 41,
            "system": "Linux 6.1.0 x86_64",
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0", "megatron-core": "0.16.1"},
    }
    lost = "LostError: trainer 3 died during 'train_step'"
    resumed_at = int(num_steps * _RESUMED_AT)
    first = {"start": 1, "time": "2026-11-25 08:00:12Z", "reason": "new run", "first_step": 0}
    second = {
        "start": 2,
        "time": "2026-11-25 08:41:40Z",
        "reason": f"restarted after {lost}",
        "first_step": resumed_at,
    }
    entries = [
        first | surroundings,
        {"end": 1, "time": "2026-11-25 08:40:02Z", "how": lost, "next_step": resumed_at + 7},
        second | surroundings,
        {"end": 2, "time": "2026-11-25 09:10:31Z", "how": "the last step", "next_step": num_steps},
    ]
    write_lines(folder / run_folder.ATTEMPTS, entries)


def _write_answers(folder: Path, num_steps: int) -> None:
    rows = [
        (17, "Name three primary colours.", "Red, yellow and blue."),
        (
            204,
            "Write a haiku on rain.",
            "Soft rain on the roof,\na thousand small hands that knock:\nlet the garden in.",
        ),
    ]
    tries = ["Red red red red", "The primary colours are", "Red, blue and yellow."]
    answers = []
    for number, text in enumerate(tries, 1):
        for row, prompt, expected in rows:
            answers.append(
                {
                    "step": num_steps * number // len(tries),
                    "source": "chat",
                    "file": "chat.jsonl",
                    "row": row,
                    "prompt": prompt,
                    "answer": text,
                    "expected": expected,
                    "ended": number == len(tries),
                }
            )
    write_lines(folder / run_folder.EVAL_SAMPLES, answers)


def _write_account(folder: Path, num_steps: int) -> None:
    """Write the ledger, the dropped rows and the skipped step."""

    def entry(rows: int, **counts: int) -> dict[str, Any]:
        return {"row_shape": "messages", "rows": rows, "epochs": 3.0, "counts": counts}

    ledger = {
        "chat": entry(
            9_000, read=27_000, trained=26_100, held_out=300, too_long=540, no_messages=60
        ),
        "code": entry(4_000, read=12_000, trained=12_000),
    }
    (folder / run_folder.LEDGER).write_text(json.dumps(ledger))
    rejects = []
    for row in range(60):
        place = {"source": "chat", "file": "s3://bucket/rows/chat.jsonl", "row": 31 * row}
        rejects.append(place | {"reason": "too_long", "detail": f"{9_000 + row} tokens"})
    write_lines(folder / run_folder.REJECTS, rejects)
    rows = [
        {"source": "code", "file": "s3://bucket/rows/code.jsonl", "row": row} for row in range(5)
    ]
    skipped = {"step": int(num_steps * _SKIPPED), "reason": "the loss is not finite", "rows": rows}
    write_lines(folder / run_folder.SKIPPED_STEPS, [skipped])


def _write_first_batch(folder: Path, tokenizer: Any) -> None:
    samples = []
    for row in range(4):
        prompt = tokenizer.encode(f"<|im_start|>user\nWhat is {row} plus {row}?<|im_end|>\n")
        answer = tokenizer.encode(f"<|im_start|>assistant\nIt is {2 * row}.<|im_end|>")
        sample = {"source": "chat", "file": "chat.jsonl", "row": row}
        sample["input_ids"] = [*prompt, *answer]
        sample["loss_mask"] = [0] * len(prompt) + [1] * len(answer)
        samples.append(sample)
    content = {"tokenizer": tokenizer.name_or_path, "micro_batches": [samples]}
    (folder / run_folder.FIRST_BATCH).write_text(json.dumps(content))
