"""Adapters train as PEFT's do: ten steps beside plain PyTorch over Hugging Face's model.

The same frozen weights and the same first adapter, the same samples; there one sample at a time,
with torch's AdamW, here packed, with Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.adapter import TARGETS, AdapterShape, adapter_parameters
from miles.architecture.families import read_shape
from miles.convert import hf_boxes
from miles.train.types import StepResult
from tests.support.adapted_ranks import PROMPT, Case, boxes, new_trainer
from tests.support.models import make_hf
from tests.support.one_rank import ALONE, start_alone
from tests.support.ranks import SETTINGS, SHAPE, batch

NUM_STEPS = 10
LOSSES = 1e-4
"""Absolute, of the losses, as the project promises."""

CASES = {
    "qwen3": AdapterShape(4, 8.0, TARGETS),
    "qwen2": AdapterShape(8, 4.0, ("q_proj", "v_proj", "down_proj"), is_rank_stabilized=True),
}
"""A family and an adapter of it."""


@pytest.fixture(scope="module", autouse=True)
def rank() -> Iterator[None]:
    from miles.train.model import process_groups

    start_alone()
    yield
    process_groups.shutdown()


def our_trainer(folder: Path, adapter: AdapterShape) -> Any:
    """Return a trainer with the weights of a folder, and a first adapter."""
    shape = read_shape(str(folder))
    trainer = new_trainer(Case(adapter, shape=shape))
    weights = hf_boxes.open_weights(str(folder), shape)
    for box in boxes(trainer, of_adapters=False):
        weights.read(box.key, box.place, box.offsets, box.data)
    return trainer


def tensors_of(trainer: Any, adapter: AdapterShape) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by PEFT's names."""
    parameters = adapter_parameters(trainer.shape, adapter)
    names = {parameter.megatron: parameter for parameter in parameters}
    tensors = {}
    for box in boxes(trainer, of_adapters=True):
        (name,) = names[box.key].hf_names(box.place)
        tensors[name] = box.data.clone()
    return tensors


def peft_model(folder: Path, adapter: AdapterShape, tensors: dict[str, torch.Tensor]) -> Any:
    """Return PEFT's model with an adapter."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.targets),
        use_rslora=adapter.is_rank_stabilized,
        task_type="CAUSAL_LM",
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    unknown = peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    assert not unknown
    return model


def train_peft(model: Any, ours: list[StepResult]) -> list[float]:
    """Train PEFT's model at the rates of our steps; return the losses."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    betas = SETTINGS.adam_beta1, SETTINGS.adam_beta2
    optimizer = torch.optim.AdamW(
        weights, betas=betas, eps=SETTINGS.adam_eps, weight_decay=SETTINGS.weight_decay
    )

    losses = []
    for step, result in enumerate(ours):
        optimizer.param_groups[0]["lr"] = result.lr
        optimizer.zero_grad()
        total = 0.0
        for packed in batch(step, ALONE)[1][0]:
            for begin, end in zip(packed.cu_seqlens, packed.cu_seqlens[1:], strict=False):
                part = slice(begin, end)
                logits = model(torch.from_numpy(packed.input_ids[part])[None]).logits[0]
                labels = torch.from_numpy(packed.labels[part])
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
                loss = (loss * torch.from_numpy(packed.loss_mask[part])).sum() / result.num_tokens
                loss.backward()
                total += loss.item()

        torch.nn.utils.clip_grad_norm_(weights, SETTINGS.clip_grad)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_ten_steps_are_those_of_peft(tmp_path: Path, family: str, record_property: Any) -> None:
    adapter = CASES[family]
    make_hf(tmp_path, family, tied=False, vocab_size=SHAPE.vocab_size)
    trainer = our_trainer(tmp_path, adapter)
    model = peft_model(tmp_path, adapter, tensors_of(trainer, adapter))

    ours = []
    for step in range(NUM_STEPS):
        report, (micro_batches,) = batch(step, ALONE)
        ours.append(trainer.train_step(report, micro_batches))
    theirs = train_peft(model, ours)

    losses = [result.loss for result in ours]
    difference = float(np.abs(np.array(losses) - theirs).max())
    record_property("largest difference of a loss", difference)
    assert difference < LOSSES
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0].numpy()
        with model.disable_adapter():
            untrained = model(torch.tensor([PROMPT])).logits[0].numpy()
    assert np.abs(logits - untrained).max() > 0.5, "nothing was learnt"
    np.testing.assert_allclose(trainer.logits(PROMPT), logits, rtol=0, atol=1e-3)
