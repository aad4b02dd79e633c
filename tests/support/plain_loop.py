"""Training in plain PyTorch: transformers' model, each sample by itself, torch's own AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from miles.data.config import DataConfig
from miles.train.optimizer_settings import OptimizerSettings
from tests.support.run_numbers import Numbers
from tests.support.streams import local


def train_plainly(
    model: Any, config: DataConfig, settings: OptimizerSettings, num_steps: int
) -> Numbers:
    """Return the numbers of some steps of a model of transformers, with the data of one rank.

    Experts are balanced by what the step before chose. The first step's choices are counted ahead.
    """
    model.train()
    optimizer = adamw(model, settings)
    numbers = Numbers([], [], [], [])
    steps = local(config)[:num_steps]
    balancing = settings.moe_aux_loss_coeff
    frequencies = counted_ahead(model, steps[0]) if balancing else None
    for number, step in enumerate(steps):
        numbers.rates.append(rate(settings, number, num_steps))
        for group in optimizer.param_groups:
            group["lr"] = numbers.rates[-1]
        optimizer.zero_grad()

        sums, counts = np.zeros(2), np.zeros(2)
        routed = Routed()
        for sample in samples_of(step):
            out = model(sample.ids[None], output_router_logits=balancing > 0)
            losses = torch.nn.functional.cross_entropy(
                out.logits[0], sample.labels, reduction="none"
            )
            loss = (losses * sample.mask).sum()
            total = loss / step.num_trained_tokens
            if frequencies is not None:
                probabilities = routed.add(model, out) / num_routed(model, step)
                total = total + balancing * balancing_loss(frequencies, probabilities)
            total.backward()
            sums[sample.source] += loss.item()
            counts[sample.source] += float(sample.mask.sum())

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        numbers.grad_norms.append(float(norm))
        numbers.losses.append(float(sums.sum() / counts.sum()))
        numbers.source_losses.append(tuple(sums / np.maximum(counts, 1)))
        if frequencies is not None:
            frequencies = routed.choices / num_routed(model, step)
            of_step = balancing_loss(frequencies, routed.probabilities / num_routed(model, step))
            numbers.balancing_losses.append(of_step.item())
    return numbers


def adamw(model: Any, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return torch's AdamW, which decays matrices alone: no norms and no biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )


def rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to the least."""
    warmup, highest, least = settings.lr_warmup_iters, settings.lr, settings.min_lr
    if step < warmup:
        return highest * step / warmup
    share = (step - warmup) / (num_steps - warmup)
    return least + (highest - least) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Sample:
    """A sample of a step, by itself."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    source: int


def samples_of(step: Any) -> Iterator[Sample]:
    """Yield the samples of a step that one rank has."""
    for batch in step.micro_batches[0]:
        for segment, source in enumerate(batch.source_ids):
            part = slice(batch.cu_seqlens[segment], batch.cu_seqlens[segment + 1])
            arrays = (batch.input_ids, batch.labels, batch.loss_mask)
            yield Sample(*(torch.from_numpy(array[part]) for array in arrays), source=int(source))


# --- balancing experts, with Hugging Face's formula


@dataclass
class Routed:
    """What the routers of all layers did with the tokens of a step."""

    probabilities: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """[experts]: summed over tokens and layers"""
    choices: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """[experts]: how often each was chosen"""

    def add(self, model: Any, out: Any) -> torch.Tensor:
        """Add a sample; return its part of `probabilities`, with its gradient."""
        probabilities = torch.cat(tuple(out.router_logits)).softmax(-1)
        chosen = probabilities.topk(model.config.num_experts_per_tok).indices
        self.choices = self.choices + torch.zeros_like(probabilities).scatter(1, chosen, 1.0).sum(0)
        self.probabilities = self.probabilities + probabilities.sum(0).detach()
        return probabilities.sum(0)


def counted_ahead(model: Any, step: Any) -> torch.Tensor:
    """Return how often each expert is chosen in a step, for a token in a layer."""
    routed = Routed()
    with torch.no_grad():
        for sample in samples_of(step):
            routed.add(model, model(sample.ids[None], output_router_logits=True))
    return routed.choices / num_routed(model, step)


def num_routed(model: Any, step: Any) -> int:
    """Return how many tokens the routers of all layers see in a step."""
    num_tokens: int = sum(len(batch.input_ids) for batch in step.micro_batches[0])
    return num_tokens * model.config.num_hidden_layers


def balancing_loss(frequencies: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return the loss; both are means over a step's tokens and layers, [experts]."""
    return len(frequencies) * (frequencies * probabilities).sum()
