"""The keys of a rank's sharded state that other models of Megatron ask a checkpoint for.

Our model has the layers of Megatron's local specification, most GPU users those of Transformer
Engine's. A loader refuses a checkpoint that lacks one of its keys. So a saved state has the keys of
both (`complete`); a state to load takes what the checkpoint has (`adapt`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from miles.architecture.config import ModelShape
from miles.architecture.families import extra_states_of, parameters_of

_IN_EVERY_LAYER = "decoder.layers.self_attention.linear_proj._extra_state"
"""An object that both specifications have in each layer."""


def complete(state: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Return a rank's state of the model with the keys of both specifications.

    Each added object is written by the rank that writes the layer's own: it has the same place and
    replica id.

    Args:
        state: `GPTModel.sharded_state_dict()`.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    completed = dict(state)
    of_key = _by_key(state)
    for extra in extra_states_of(shape):
        if extra.key in of_key:  # Megatron's own
            continue
        if extra.stacked_by:
            added = [replace(found, key=extra.key) for found in of_key.get(_IN_EVERY_LAYER, ())]
        else:
            weights = of_key.get(f"{extra.module}.weight", ())
            added = [ShardedObject(extra.key, None, (1,), (0,), one.replica_id) for one in weights]
        completed |= {value.unique_key: value for value in added}

    for parameter in parameters_of(shape):
        if parameter.second_key is not None:
            for number, tensor in enumerate(of_key.get(parameter.megatron, ())):
                name = f"{parameter.second_key} {number}"
                completed[name] = replace(tensor, key=parameter.second_key)
    return completed


def adapt(state: Mapping[str, Any], shape: ModelShape, stored: Collection[str]) -> dict[str, Any]:
    """Return a rank's state of the model with the keys that a checkpoint has.

    It has no extra states: they are empty, and older checkpoints lack them.

    Args:
        state: `GPTModel.sharded_state_dict()`.
        stored: the keys of the checkpoint's tensors.
    """
    adapted = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    of_key = _by_key(adapted)
    for parameter in parameters_of(shape):
        second_key = parameter.second_key
        if second_key in stored and parameter.megatron not in stored:
            for tensor in of_key.get(parameter.megatron, ()):
                tensor.key = second_key
    return adapted


def _by_key(state: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Group the values of a state by the key that they have in a checkpoint."""
    of_key: dict[str, list[Any]] = {}
    for value in state.values():
        of_key.setdefault(value.key, []).append(value)
    return of_key
