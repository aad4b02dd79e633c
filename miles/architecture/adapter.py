"""The adapter of a LoRA run: its shape, and its parameter map.

Beside the weight W [out, in] of a Hugging Face projection lie A [rank, in] and B [out, rank], and
the projection computes

    y  =  W x  +  scale B A x

Megatron keeps queries, keys and values in one matrix, and the gate and the up projection in
another. An adapter is of one Hugging Face projection all the same, so that it is PEFT's tensor by
tensor: `q_proj` of layer 3 has a pair of its own, and its B has its rows in Hugging Face's order.
In a Megatron checkpoint the pairs of all layers are stacked, as other tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.architecture.config import ModelShape
from miles.architecture.parameters import LAYER, Parameter, plain
from miles.architecture.sizes import key_size, query_size
from miles.errors import ConfigError

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION_TARGETS, *MLP_TARGETS)
"""The projections of a layer, by Hugging Face's names, in their order."""

ROW_PARALLEL_TARGETS = ("o_proj", "down_proj")
"""Projections whose columns tensor parallelism divides; of the others, it divides the rows."""

ALL_LINEAR = "all-linear"
"""Stands for all of them, as in PEFT."""

MEGATRON_NAMES: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""The projections in each of Megatron's matrices. Its names are taken as targets, too."""

ADAPTER = "decoder.layers.adapter"
"""Begins the keys of the adapter's tensors in a Megatron checkpoint."""
PEFT_PREFIX = "base_model.model."
"""Begins the names of the adapter's tensors in PEFT's files."""


@dataclass(frozen=True)
class AdapterShape:
    """The shape of an adapter's tensors, and its scale."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """projections that have one, of `TARGETS` and in its order"""
    is_rank_stabilized: bool = False
    """scaled as in rsLoRA (Kalajdzievski, 2023)"""

    @property
    def scale(self) -> float:
        """The factor before the product: alpha / rank, of rsLoRA alpha / √rank."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilized else self.rank)

    def to_json(self) -> dict[str, Any]:
        """Return it for `miles.json`."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "is_rank_stabilized": self.is_rank_stabilized,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AdapterShape:
        """Return what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            int(content["rank"]),
            float(content["alpha"]),
            tuple(map(str, content["targets"])),
            bool(content["is_rank_stabilized"]),
        )


def projection_sizes(shape: ModelShape, target: str) -> tuple[int, int]:
    """Return the sizes [out, in] of a projection."""
    hidden, queries, keys = shape.hidden_size, query_size(shape), key_size(shape)
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (shape.ffn_hidden_size, hidden),
        "up_proj": (shape.ffn_hidden_size, hidden),
        "down_proj": (hidden, shape.ffn_hidden_size),
    }[target]


def pair_parameters(shape: ModelShape, target: str, rank: int) -> int:
    """Return the parameters of A and B beside one projection."""
    return rank * sum(projection_sizes(shape, target))


def total_adapter_parameters(shape: ModelShape, adapter: AdapterShape) -> int:
    """Return the parameters of a whole adapter."""
    pairs = (pair_parameters(shape, target, adapter.rank) for target in adapter.targets)
    return shape.num_layers * sum(pairs)


def described(shape: ModelShape, adapter: AdapterShape, num_parameters: int) -> str:
    """Return what an adapter is, in a phrase.

    Args:
        num_parameters: of the whole model.
    """
    trained = total_adapter_parameters(shape, adapter)
    return (
        f"{trained:,} parameters beside {num_parameters:,} frozen ones ({trained / num_parameters:.2%})"
        f" are trained: rank {adapter.rank}, scale {adapter.scale:g}, on {', '.join(adapter.targets)}"
    )


def module_of(target: str) -> str:
    """Return the Hugging Face module of a projection; `{layer}` stands for a number."""
    part = "self_attn" if target in ATTENTION_TARGETS else "mlp"
    return f"model.layers.{{layer}}.{part}.{target}"


def adapter_parameters(shape: ModelShape, adapter: AdapterShape) -> tuple[Parameter, ...]:
    """Return the parameter map of an adapter: A and B of each target.

    The Hugging Face names are those of PEFT's `adapter_model.safetensors`.
    """
    parameters = []
    for target in adapter.targets:
        num_out, num_in = projection_sizes(shape, target)
        pair = {"lora_A": (adapter.rank, num_in), "lora_B": (num_out, adapter.rank)}

        for name, sizes in pair.items():
            parameters.append(
                Parameter(
                    f"{ADAPTER}.{target}.{name}",
                    (f"{PEFT_PREFIX}{module_of(target)}.{name}.weight",),
                    (sizes,),
                    plain,
                    LAYER,
                )
            )
    return tuple(parameters)


def resolve_targets(
    shape: ModelShape, target_modules: Sequence[str], exclude_modules: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the projections that names of modules stand for.

    Args:
        target_modules: Hugging Face's names, Megatron's, or `ALL_LINEAR`: all projections of the
            model that are linear layers of their own, which experts are not.
        exclude_modules: such names, of projections to leave out.

    Raises:
        ConfigError: a name that is none of them; experts; nothing is left.
    """
    has_experts = shape.num_experts is not None
    allowed = ATTENTION_TARGETS if has_experts else TARGETS
    excluded: set[str] = set()
    for name in exclude_modules:
        excluded.update(TARGETS if name == ALL_LINEAR else _targets_of("--exclude-modules", name))

    chosen: set[str] = set()
    for name in target_modules:
        targets = allowed if name == ALL_LINEAR else _targets_of("--target-modules", name)
        of_experts = set(targets) - set(allowed) - excluded
        if of_experts:
            raise ConfigError(
                f"--target-modules {name}: the model's {', '.join(sorted(of_experts))} are those of "
                "experts, for which there are no adapters; give "
                f"{' '.join(ATTENTION_TARGETS)}, or {ALL_LINEAR}, which leaves them out"
            )
        chosen.update(targets)

    remaining = tuple(target for target in TARGETS if target in chosen - excluded)
    if not remaining:
        without = ", and --exclude-modules leaves out all of them" if chosen else " names none"
        raise ConfigError(
            f"there is no projection to train: --target-modules{without}; name some of "
            f"{', '.join(allowed)}, or {ALL_LINEAR}"
        )
    return remaining


def _targets_of(flag: str, name: str) -> tuple[str, ...]:
    """Return the projections of a name."""
    if name in TARGETS:
        return (name,)
    if name in MEGATRON_NAMES:
        return MEGATRON_NAMES[name]
    raise ConfigError(
        f"{flag} {name[:100]}: no projection has this name; there are {', '.join(TARGETS)}, Megatron's "
        f"{', '.join(MEGATRON_NAMES)}, and {ALL_LINEAR}"
    )
