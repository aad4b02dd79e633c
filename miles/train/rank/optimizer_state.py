"""The optimizer's part of a checkpoint: made ready to be loaded, and equal for each kind of Adam.

A checkpoint that was saved with Adam on the GPU continues with Adam on the CPU, and the other way.

Where experts are spread over ranks, Megatron gives them an optimizer of their own: two parts, where
another layout has one. A checkpoint continues with either (`match_keys`, `match_parts`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

_PREFIXES = ("", "chained_0.", "chained_1.")
"""Megatron's for the keys of one of several parts; older checkpoints of ours have them."""
_GROUP_KEYS = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""Megatron tells parameter groups apart by these, and by whether their experts are spread."""
_SCHEDULE_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd", "optimizer")
"""The settings of the schedule that Megatron keeps in a group. 0.19 tells groups apart by them, too,
and a run that continues has the settings of its own line."""
_SHARED_KEYS = ("lr", "betas", "eps", "weight_decay")
"""The defaults that every kind of Adam has; each kind adds its own to its parameter groups."""

_BIAS_CORRECTION = "bias_correction"


def prepare(optimizer: Any) -> None:
    """Make an optimizer ready to be saved or loaded.

    `DistributedOptimizer.state_dict` of megatron-core 0.16.1 asserts that torch's Adam has taken a
    step, also while loading, and where all steps so far were skipped. So it takes one that changes
    nothing and does not count.

    Args:
        optimizer: Megatron's `ChainedOptimizer`.
    """
    for part in optimizer.chained_optimizers:
        if _has_torch_adam(part.optimizer) and not part.optimizer.state:
            _take_empty_step(part.optimizer)


@contextmanager
def places_without_padding(optimizer: Any) -> Iterator[None]:
    """Tell Megatron where each weight's state is, for as long as the context lasts.

    `sharded_param_state_fully_reshardable` of megatron-core 0.16.1 and 0.19.2 puts the state of a
    buffer together without the padding at the end of each bucket, and then looks up its weights at
    their places in the padded buffer: behind the first padding, each weight gets elements of its
    neighbours ("param range exceeds unpadded buffer", or no word). One bucket has no such padding;
    `--overlap-grad-reduce` makes several.

    Args:
        optimizer: Megatron's `ChainedOptimizer`.
    """
    buffers = []
    for part in optimizer.chained_optimizers:
        buffers += part.buffers
    padded = [buffer.param_index_map for buffer in buffers]

    for buffer in buffers:
        shifts = [0]
        for bucket in buffer.buckets:
            shifts.append(shifts[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
        buffer.param_index_map = {
            weight: (start - shifts[bucket_id], end - shifts[bucket_id], bucket_id)
            for weight, (start, end, bucket_id) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def copy_views(state: Any) -> None:
    """Give each tensor of a state to save memory of its own, and free what it was a part of.

    Megatron gathers the masters and both moments of all weights in a large tensor each, of which a
    weight's are views. Its writer copies the views that this rank writes while the large tensors
    are still there, so that the machine would hold them twice. Here they go one after another.

    Args:
        state: of the optimizer, as `sharded_state_dict` gives it. It is changed.
    """
    from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

    apply_factories(state)  # the two halves of a gated projection would be views again
    for of_tensor in _views(state).values():
        if any(is_main_replica(value.replica_id) for value in of_tensor):
            for value in of_tensor:
                value.data = value.data.clone()


def _views(state: Any) -> dict[int, list[Any]]:
    """Return the sharded tensors of a state that are views, by the memory that they are part of."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    views = defaultdict(list)
    for value in nested_values(state):
        data: Any = getattr(value, "data", None)
        if torch.is_tensor(data) and data.untyped_storage().nbytes() > data.nbytes:
            views[data.untyped_storage().data_ptr()].append(value)
    return views


def host_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the masters and moments that lie in the memory of the machine."""
    for part in optimizer.chained_optimizers:
        for adam in getattr(part.optimizer, "cpu_optimizers", ()):
            for group in adam.param_groups:
                yield from group["params"]
            for state in adam.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value))


def keep_step_counts(optimizer: Any) -> None:
    """Let Adam's own count of steps be loaded.

    megatron-core 0.16.1 needs it of torch's Adam, on its own or in the optimizer that offloads:
    loading "fully_reshardable" leaves the count out and then asks for it (KeyError: 'step'). So it
    gets the count that `load_state_dict` has set just before.
    """
    for part in optimizer.chained_optimizers:
        if _has_torch_adam(part.optimizer):
            part._set_main_param_and_optimizer_states = partial(
                _set_with_step, part, part._set_main_param_and_optimizer_states
            )


def _take_empty_step(adam: Any) -> None:
    rates = [group["lr"] for group in adam.param_groups]
    for group in adam.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            _set_gradient(parameter, torch.zeros_like(parameter))
    adam.step()

    for group, rate in zip(adam.param_groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            _set_gradient(parameter, None)
    for state in adam.state.values():
        if "step" in state:  # the GPU's share of the offloading Adam may be Transformer Engine's
            state["step"].zero_()


def _set_gradient(parameter: Any, gradient: torch.Tensor | None) -> None:
    """Set the gradient that Adam reads; of the offloading one, the one beside the parameter."""
    parameter.grad = gradient
    if hasattr(parameter, "decoupled_grad"):
        parameter.decoupled_grad = gradient


def _has_torch_adam(adam: Any) -> bool:
    """Return whether torch's Adam counts the steps; Transformer Engine's does it in its groups."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    return isinstance(adam, torch.optim.AdamW | HybridDeviceOptimizer)


def _set_with_step(
    optimizer: Any, set_states: Any, model_param: Any, tensors: dict[str, Any]
) -> None:
    """Set a parameter's optimizer state as Megatron does, with Adam's count of steps in it."""
    group, order = optimizer.model_param_group_index_map[model_param]
    state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
    # The offloading optimizer would keep these: slices of the tensors of all data-parallel ranks.
    own_tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if "step" in state:
        # load_state_dict gives all parameters the same tensor, which each of them would count up.
        state["step"] = state["step"].clone()
        own_tensors["step"] = state["step"].clone()
    set_states(model_param, own_tensors)


def make_portable(optimizer: Any, state: Mapping[Any, Any]) -> None:
    """Give the parameter groups of a state to save what any kind of Adam can continue with.

    What only the offloading Adam has is left out: some of it are classes, and `torch.load` refuses
    a checkpoint with them (`weights_only`). Transformer Engine's and Apex's Adam ask their groups
    for the correction of the bias, which torch's always makes.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    for adam, groups in _groups(optimizer, state):
        own_keys: list[str] = []
        if isinstance(adam, HybridDeviceOptimizer):
            own_keys = [key for key in adam.defaults if key not in _SHARED_KEYS]
        for group in groups:
            for key in own_keys:
                group.pop(key, None)
            group.setdefault(_BIAS_CORRECTION, True)


def restore_own_keys(optimizer: Any, state: Mapping[Any, Any]) -> None:
    """Give a loaded state what this kind of Adam, and this run, have in their parameter groups."""
    for adam, groups in _groups(optimizer, state):
        own = {key: value for key, value in adam.defaults.items() if key not in _SHARED_KEYS}
        own_groups = {_group_kind(group): group for group in adam.param_groups}
        for group in groups:
            group.pop(_BIAS_CORRECTION, None)
            group.update(own)
            for key in _SCHEDULE_KEYS:
                group.pop(key, None)
                if key in own_groups[_group_kind(group)]:
                    group[key] = own_groups[_group_kind(group)][key]


def match_keys(state: Mapping[Any, Any], stored: Collection[str]) -> None:
    """Give the tensors of a state to load the keys that a checkpoint has.

    Args:
        state: of the optimizer, as `sharded_state_dict` gives it, without prefixes.
        stored: the keys of the checkpoint's tensors.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for value in nested_values(dict(state)):
        key = getattr(value, "key", None)
        if key is not None and key not in stored:
            value.key = next(
                (f"{prefix}{key}" for prefix in _PREFIXES if prefix + key in stored), key
            )


def match_parts(optimizer: Any, loaded: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a loaded state with the parts that the optimizer has.

    Tensors are at their places already; the settings of the parameter groups are where the
    checkpoint's layout had them. All groups took the same number of steps.

    Args:
        optimizer: Megatron's `ChainedOptimizer`.
        loaded: what `dist_checkpointing.load` made of its state.
    """
    num_parts = len(optimizer.chained_optimizers)
    num_stored = (
        1 if "param_state_sharding_type" in loaded else sum(type(key) is int for key in loaded)
    )
    if num_parts == num_stored:
        return loaded

    stored_parts = [loaded] if num_stored == 1 else [loaded[number] for number in range(num_stored)]
    stored_groups = {}
    for part in stored_parts:
        for group in part["optimizer"]["param_groups"]:
            stored_groups[_group_kind(group)] = group

    parts = {}
    for number, part in enumerate(optimizer.chained_optimizers):
        tensors = loaded if num_parts == 1 else loaded[number]
        groups = []
        for own in part.state_dict()["optimizer"]["param_groups"]:
            stored = stored_groups[_group_kind(own)]
            groups.append({**stored, "is_expert_parallel": own["is_expert_parallel"]})

        parts[number] = {
            "optimizer": {"param_groups": groups},
            "param_state": tensors["param_state"],
            "param_state_sharding_type": stored_parts[0]["param_state_sharding_type"],
        }
    return parts[0] if num_parts == 1 else parts


def _group_kind(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in _GROUP_KEYS)


def _groups(optimizer: Any, state: Mapping[Any, Any]) -> list[tuple[Any, list[dict[str, Any]]]]:
    """Return each chained optimizer's Adam with its parameter groups in a state."""
    parts = optimizer.chained_optimizers
    states = [state] if len(parts) == 1 else [state[number] for number in range(len(parts))]
    return [
        (part.optimizer, part_state["optimizer"]["param_groups"])
        for part, part_state in zip(parts, states, strict=True)
    ]
