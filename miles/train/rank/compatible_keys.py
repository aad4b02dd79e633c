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

    What is added is written by the rank that writes the layer's own: it has the same place and
    replica id.

    Args:
        state: `model`, as `GPTModel.sharded_state_dict()` gives it, and where the optimizer is
            saved `optimizer`, whose tensors have the keys of the model's in theirs.
    """
    return {**state["model"], **_extra_states(state["model"], shape), **_second_keys(state, shape)}


def _extra_states(model: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Return the extra states of Transformer Engine's layers that Megatron's local ones lack."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    of_key = _by_key(model)
    added: list[ShardedObject] = []
    for extra in extra_states_of(shape):
        if extra.key in of_key:
            continue
        if extra.stacked_by:
            added += [replace(found, key=extra.key) for found in of_key.get(_IN_EVERY_LAYER, ())]
        else:
            for weight in of_key.get(f"{extra.module}.weight", ()):
                added.append(ShardedObject(extra.key, None, (1,), (0,), weight.replica_id))
    return {value.unique_key: value for value in added}


def _second_keys(state: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Return the tensors that have another key in Transformer Engine's layers, under that key."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    tensors = [value for value in nested_values(dict(state)) if hasattr(value, "key")]
    added: dict[str, Any] = {}
    for parameter in parameters_of(shape):
        if parameter.second_key is None:
            continue
        for tensor in tensors:
            if tensor.key.endswith(parameter.megatron):
                key = tensor.key.removesuffix(parameter.megatron) + parameter.second_key
                added[f"{key} {len(added)}"] = replace(tensor, key=key)
    return added


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
