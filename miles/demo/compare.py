"""Compare the demo's exported model with the trained one, and let it answer a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.text import Text

from miles.architecture.families import read_shape
from miles.common import checkpoint_folder
from miles.common.prose import Prose
from miles.demo import rows
from miles.errors import MilesError
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.rank.actor import TrainerActor
from miles.train.types import RankEnvironment, RankSetup, StartPoint, TrainerSettings

MAX_DIFFERENCE = 1e-4
"""Bound on the difference between the logits of transformers and of Megatron, float32."""

HELD_OUT = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Why does bread rise in the oven?"},
    {
        "role": "assistant",
        "content": "Its yeast makes gas, and the heat lets the gas grow before the crust sets.",
    },
]
"""A conversation that is not among the demo's rows."""


def compare_export(folder: Path, console: Console) -> None:
    """Compare transformers on the export with Megatron on the checkpoint; print an answer.

    Args:
        folder: the demo's folder, with `hf`, `checkpoints` and `export` in it. Ray must run.

    Raises:
        MilesError: the two models differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)

    ids = tokenizer.apply_chat_template(HELD_OUT, tokenize=True, return_dict=False)
    with torch.no_grad():
        exported = model(torch.tensor([ids])).logits[0].numpy()
    trained = _megatron_logits(folder, ids)
    difference = float(np.abs(trained - exported).max())
    console.print(
        Prose(
            f"  logits of a held-out conversation, {len(ids)} tokens: "
            f"largest difference {difference:.1e}"
        ),
        soft_wrap=True,
    )
    if not difference < MAX_DIFFERENCE:
        raise MilesError(
            f"the exported model differs from the trained one by {difference}, "
            f"over {MAX_DIFFERENCE}"
        )

    question = json.loads(rows.lines("chat")[0])["conversations"][0]["value"]
    console.print(Prose(Text.assemble("  ", ("asked:", "dim"), f"    {question}")), soft_wrap=True)
    answer = _answer(model, tokenizer, question)
    console.print(Prose(Text.assemble("  ", ("answered:", "dim"), f" {answer}")), soft_wrap=True)


def _megatron_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Return the logits of a sequence, float32 [tokens, vocabulary], from the last checkpoint."""
    checkpoint = checkpoint_folder.find(str(folder / "checkpoints"))
    assert checkpoint is not None
    shape = read_shape(str(folder / "hf"))
    settings = TrainerSettings(
        shape,
        Layout(1),
        OptimizerSettings(),
        num_steps=1,
        num_sources=1,
        precision=Precision.FP32,
    )
    start = StartPoint(checkpoint, is_resume=False)
    setup = RankSetup(settings, start, seed=1234, timeout_minutes=10)

    # On a CPU, as transformers beside it. Ray 2.60 shows all GPUs to an actor that asks for none.
    environment = RankEnvironment(has_gpu=False, given={"CUDA_VISIBLE_DEVICES": ""})
    actor = ray.remote(num_cpus=0)(TrainerActor).remote(0, environment)
    address = ray.get(actor.listen.remote())
    ray.get(actor.setup.remote(address, setup), timeout=120)
    logits: np.ndarray = ray.get(actor.logits.remote(ids))
    ray.kill(actor)
    return logits


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    """Return a greedy answer of at most 60 tokens, on one line."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    answer: str = tokenizer.decode(out[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())
