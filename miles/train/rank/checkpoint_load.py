"""Between a trainer and Megatron's sharded state: load a checkpoint, and build the state to save.

A checkpoint can be loaded at any layout, whatever layout it was saved from: each rank names the
parts of the tensors that it holds, and Megatron reads those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from miles.architecture.sizes import padded_vocab_size
from miles.common import checkpoint_folder, safe_pickle, storage
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.errors import CheckpointError
from miles.train.model.adapters import is_adapter
from miles.train.model.padding_rows import zero_padding_rows
from miles.train.rank import compatible_keys, finite_weights, optimizer_state, weight_boxes
from miles.train.rank.base_weights import BaseWeights
from miles.train.rank.trainer import Trainer
from miles.train.types import StartPoint

CONTENT_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Without it the keys would depend on whether experts are spread.
    "chained_optim_avoid_prefix": True,
}
"""The form of the optimizer's state. Written beside it, for Megatron-LM's loader."""


def load_start(trainer: Trainer, start: StartPoint) -> BaseWeights | None:
    """Load what an attempt begins from into a trainer. Collective.

    Returns:
        the frozen weights beside an adapter; None: all weights are trained.

    Raises:
        CheckpointError: as `load`; a base that is not the one of the adapter; an adapter that
            cannot be read.
    """
    if trainer.adapter is None:
        load(trainer, start.checkpoint, model_only=not start.is_resume)
        return None

    frozen = start.base or start.checkpoint
    load(trainer, frozen, model_only=True)
    base = BaseWeights.of(trainer, frozen.url)
    if start.is_resume:
        base.require_same(start.checkpoint)
        load(trainer, start.checkpoint, model_only=False, of_adapter=True)
    elif start.adapter_path is not None:
        weight_boxes.load_adapter(trainer, start.adapter_path)
        finite_weights.require_finite(trainer, start.adapter_path, with_optimizer=False)
    return base


def load(
    trainer: Trainer, checkpoint: SavedCheckpoint, *, model_only: bool, of_adapter: bool = False
) -> None:
    """Load a checkpoint, or the weights of a Hugging Face folder, into a trainer. Collective.

    Args:
        model_only: leave the optimizer and the schedule as they are, to begin from these weights.
        of_adapter: the checkpoint holds the adapter, and not the weights of the model.

    Raises:
        CheckpointError: a model of another shape, tensors that are missing, or such as are NaN or
            infinite.
    """
    if not model_only:
        trainer.restore_extra_state(checkpoint)
    if checkpoint.is_hugging_face:
        weight_boxes.load_weights(trainer, checkpoint.url)
    else:
        _load_sharded(trainer, checkpoint, model_only=model_only, of_adapter=of_adapter)
    finite_weights.require_finite(trainer, checkpoint.url, with_optimizer=not model_only)


def _load_sharded(
    trainer: Trainer, checkpoint: SavedCheckpoint, *, model_only: bool, of_adapter: bool
) -> None:
    from megatron.core import dist_checkpointing

    with storage.local_folder(checkpoint.url, "checkpoint") as folder:
        safe_pickle.require_plain(folder, checkpoint.url)
        try:
            common = dist_checkpointing.load_common_state_dict(str(folder))
        except Exception as error:  # JSON's errors, torch's or pickle's
            raise CheckpointError(
                f"{checkpoint.url}: its metadata.json or its common part (common.pt) cannot be "
                f"read ({type(error).__name__}: {str(error)[:500]}). Put the iteration of another "
                "complete checkpoint into the tracker, and give the same command again"
            ) from error
        differences = trainer.shape.differences(vars(common["args"])) if "args" in common else []
        if differences:
            raise CheckpointError(
                f"{checkpoint.url}: a checkpoint of another model: {'; '.join(differences)}"
            )

        if not model_only:
            optimizer_state.keep_step_counts(trainer.optimizer)
        try:
            stored = dist_checkpointing.load_tensors_metadata(str(folder))
            _require_kind(checkpoint, stored, of_adapter=of_adapter)
            own = _model_state(trainer, of_adapter=of_adapter)
            model = compatible_keys.adapt(own, trainer.shape, stored)
            state = _state(trainer, model, loading=True, model_only=model_only)
            optimizer_state.match_keys(state.get("optimizer", {}), stored)
            loaded = dist_checkpointing.load(state, str(folder), strict="assume_ok_unexpected")
        except CheckpointError:
            raise
        except CheckpointException as error:
            raise _unreadable(checkpoint, error) from error
        except Exception as error:  # Megatron's error classes, torch's or pickle's
            raise CheckpointError(
                f"{checkpoint.url}: cannot be loaded into this model "
                f"({type(error).__name__}: {str(error)[:500]})"
            ) from error

    trainer.gpt.load_state_dict(loaded["model"], strict=False)
    zero_padding_rows(trainer.gpt, trainer.shape)
    if model_only:
        trainer.copy_weights_to_optimizer()
    else:
        own_parts = optimizer_state.match_parts(trainer.optimizer, loaded["optimizer"])
        optimizer_state.restore_own_keys(trainer.optimizer, own_parts)
        trainer.optimizer.load_state_dict(own_parts)
        trainer.scheduler.load_state_dict(loaded["opt_param_scheduler"])


def _require_kind(
    checkpoint: SavedCheckpoint, stored: Collection[str], *, of_adapter: bool
) -> None:
    """Refuse an adapter in the place of a model, and the reverse.

    It is refused before the start by what `miles.json` says, which may be missing.
    """
    if any(map(is_adapter, stored)) == of_adapter:
        return
    if of_adapter:
        raise CheckpointError(f"{checkpoint.url}: holds no adapter, as its miles.json says")
    raise CheckpointError(
        f"{checkpoint.url}: holds an adapter, and no whole model. Merge the two with miles convert "
        "merge-adapter, and begin from what it writes"
    )


def _unreadable(checkpoint: SavedCheckpoint, error: CheckpointException) -> CheckpointError:
    """Return the error of files that are missing or broken, as after a copy that broke off.

    torch's exception is no `Exception`: it holds those of all ranks.
    """
    reasons = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
    return CheckpointError(
        f"{checkpoint.url}: cannot be read ({'; '.join(sorted(reasons))[:500]}). Copy the "
        f"checkpoint again. {checkpoint_folder.other_ways(checkpoint.url)}"
    )


def state_to_save(
    trainer: Trainer, iteration: int, extra: Mapping[str, Any], *, model_only: bool = False
) -> dict[str, Any]:
    """Return the state for Megatron's `dist_checkpointing`.

    It has sharded tensors, and a common part with the keys of Megatron-LM. Where an adapter is
    trained, its tensors are the only ones.

    Args:
        iteration: steps that the state holds.
        extra: content of `miles.json`; its cursor has the number of consumed rows.
        model_only: leave out the optimizer and the schedule.
    """
    trainer.gather_weights()
    model = _model_state(trainer, of_adapter=trainer.adapter is not None)

    state = _state(trainer, model, loading=False, model_only=model_only)
    state["model"] = compatible_keys.complete(state, trainer.shape)
    state["args"] = trainer.shape.checkpoint_args(
        padded_vocab_size=padded_vocab_size(trainer.shape, trainer.layout.tensor),
        tensor=trainer.layout.tensor,
        pipeline=trainer.layout.pipeline,
        expert=trainer.layout.expert,
        expert_tensor=trainer.layout.expert_tensor,
        consumed_rows=int(extra.get("cursor", {}).get("consumed_rows", 0)),
        has_optimizer=not model_only,
    )

    state["checkpoint_version"] = 3.0
    state["iteration"] = iteration
    state["num_floating_point_operations_so_far"] = 0
    return state


def num_local_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes that this rank writes of a state: the tensors whose main copy it holds."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    num_bytes = 0
    for value in nested_values(state):
        is_tensor = torch.is_tensor(getattr(value, "data", None))
        if is_tensor and is_main_replica(getattr(value, "replica_id", 0)):
            num_bytes += value.data.nbytes
    return num_bytes


def _model_state(trainer: Trainer, *, of_adapter: bool) -> dict[str, Any]:
    """Return the sharded state of the adapter, or of the model without it."""
    state = trainer.gpt.sharded_state_dict()
    return {name: value for name, value in state.items() if is_adapter(value.key) == of_adapter}


def _state(
    trainer: Trainer, model: dict[str, Any], *, loading: bool, model_only: bool
) -> dict[str, Any]:
    """Return the sharded state with the keys of Megatron-LM.

    Args:
        model: this rank's state of the model.
    """
    state: dict[str, Any] = {"model": model}
    if not model_only:
        optimizer_state.prepare(trainer.optimizer)
        with optimizer_state.places_without_padding(trainer.optimizer):
            state["optimizer"] = trainer.optimizer.sharded_state_dict(
                model, is_loading=loading, metadata=CONTENT_FORMAT
            )
        if not loading:
            optimizer_state.make_portable(trainer.optimizer, state["optimizer"])
            optimizer_state.copy_views(state["optimizer"])
        state["opt_param_scheduler"] = trainer.scheduler.state_dict()
    return state
