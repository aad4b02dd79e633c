"""Checkpoints in Megatron's `torch_dist` layout: finding, loading, naming and removing them (`saver.py` writes them).

SAVE/iter_0000100/                        the distributed checkpoint (model, optimizer, schedule, args)
SAVE/iter_0000100/miles.json              the data cursor and the position in metrics.jsonl
SAVE/latest_checkpointed_iteration.txt    "100": written last; what it does not name is not complete
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from miles.common import safe_pickle, storage
from miles.common.checkpoint_tracker import TRACKER, tracked
from miles.errors import CheckpointError
from miles.train.rank.trainer import Trainer

EXTRA = "miles.json"
SAVING = ".saving-"
"""What the name of a folder begins with that is no checkpoint yet, or never became one."""
_ITERATION = re.compile(r"iter_\d{7,}")
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Found:
    """A complete checkpoint."""

    url: str
    """its own folder, `…/iter_0000100` or `…/release`"""
    iteration: int
    """optimizer steps taken; 0 for a converted one"""
    extra: dict[str, Any] | None
    """content of `miles.json`; None for a checkpoint that this trainer did not write"""


def find(url: str) -> Found | None:
    """The newest complete checkpoint under a folder (fsspec URL); None where there is none.

    Raises:
        CheckpointError: the tracker names what is not there, or is not a tracker.
    """
    named = tracked(url)
    if named is None:
        return None
    name, iteration = named
    folder, tracker = storage.join(url, name), storage.join(url, TRACKER)
    if not storage.exists(storage.join(folder, "metadata.json")):
        raise CheckpointError(f"{tracker} names {folder}, which is not there or not a torch_dist checkpoint")
    extra = storage.join(folder, EXTRA)
    content = json.loads(storage.read_text(extra)) if storage.exists(extra) else None
    return Found(folder, iteration, content)


def load(trainer: Trainer, found: Found, *, model_only: bool) -> None:
    """Puts a checkpoint into a trainer, whatever layout it was saved from.

    Args:
        model_only: leave the optimizer and the schedule as they are (a fresh start from these weights).

    Raises:
        CheckpointError: a model of another shape, or tensors that are missing.
    """
    from megatron.core import dist_checkpointing

    with storage.local_folder(found.url, "checkpoint") as folder:
        safe_pickle.require_plain(folder, found.url)
        common = dist_checkpointing.load_common_state_dict(str(folder))
        differences = trainer.shape.differences(vars(common["args"])) if "args" in common else []
        if differences:
            raise CheckpointError(f"{found.url}: a checkpoint of another model: {'; '.join(differences)}")
        if not model_only:
            _prepare_adam(trainer)
        state = _state(trainer, loading=True, model_only=model_only)
        try:
            loaded = dist_checkpointing.load(state, str(folder), strict="assume_ok_unexpected")
        except Exception as error:  # its own error classes, torch's and pickle's, by what is wrong
            raise CheckpointError(
                f"{found.url}: cannot be loaded into this model ({type(error).__name__}: {str(error)[:500]})"
            ) from error
    trainer.gpt.load_state_dict(loaded["model"], strict=False)
    if model_only:
        trainer.weights_loaded()
    else:
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        trainer.scheduler.load_state_dict(loaded["opt_param_scheduler"])


def publish(url: str, iteration: int) -> None:
    """Names a checkpoint, all files of which are there, in the tracker."""
    storage.write_text(storage.join(url, TRACKER), str(iteration))


def state_to_save(
    trainer: Trainer, iteration: int, extra: Mapping[str, Any], *, model_only: bool = False
) -> dict[str, Any]:
    """What Megatron's `dist_checkpointing` is given: sharded tensors, and the common part as Megatron-LM has it."""
    state = _state(trainer, loading=False, model_only=model_only)
    state["args"] = trainer.shape.checkpoint_args(
        tensor=trainer.layout.tensor,
        pipeline=trainer.layout.pipeline,
        expert=trainer.layout.expert,
        expert_tensor=trainer.layout.expert_tensor,
        consumed_rows=int(extra.get("cursor", {}).get("consumed_rows", 0)),
    )
    state["checkpoint_version"] = 3.0
    state["iteration"] = iteration
    state["num_floating_point_operations_so_far"] = 0
    return state


def num_local_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of tensors that this rank writes of a state: those of which it holds the main copy."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    return sum(
        value.data.nbytes
        for value in nested_values(state)
        if torch.is_tensor(getattr(value, "data", None)) and is_main_replica(getattr(value, "replica_id", 0))
    )


def remove_old(url: str, keep_last: int | None, keep_best: int | None) -> list[str]:
    """Removes the checkpoints of a folder that are neither among the newest nor among the best.

    Args:
        keep_last: newest ones to keep; None: all, or with `keep_best` the newest alone.
        keep_best: ones with the lowest evaluation loss to keep beside them; None: none.

    Returns:
        the folders that were removed. What the tracker names is kept always.
    """
    if keep_last is None and keep_best is None:
        return []
    fs, root = storage.filesystem(url)
    fs.invalidate_cache(root)  # the newest was written by another process
    newest, _ = tracked(url) or ("", 0)
    names = [path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]
    # Beyond the newest: of a run from which somebody went back to an earlier one. Not ours to remove.
    folders = [f"{root}/{name}" for name in sorted(names) if _ITERATION.fullmatch(name) and name <= newest]
    losses: dict[str, float] = {}
    for path in folders if keep_best else []:
        if fs.exists(f"{path}/{EXTRA}"):
            loss = json.loads(fs.cat_file(f"{path}/{EXTRA}")).get("eval_loss")
            losses |= {} if loss is None else {path: loss}
    kept = {*folders[-(keep_last or 1) :], *sorted(losses, key=lambda path: losses[path])[: keep_best or 0]}
    removed = [path for path in folders if path not in kept]
    for path in removed:
        fs.rm(path, recursive=True)
    return removed


def remove_unfinished(url: str) -> list[str]:
    """Removes what saves that were broken off left in a local folder; returns the names. Of no run under way."""
    if not storage.is_local(url):
        return []
    root = Path(storage.filesystem(url)[1])
    left = sorted(root.glob(f"{SAVING}*"))
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in left]


def _prepare_adam(trainer: Trainer) -> None:
    """Makes torch's Adam ready to be loaded into, for megatron-core 0.16.1 without Apex or Transformer Engine.

    - `DistributedOptimizer.state_dict` asserts that Adam has taken a step, also while loading: it takes one that
      changes nothing.
    - loading "fully_reshardable" leaves out Adam's own count of steps and then asks for it (KeyError: 'step'): it
      gets the count that is there, which `load_state_dict` has set just before.
    """
    for optimizer in trainer.optimizer.chained_optimizers:
        adam = optimizer.optimizer
        rates = [group["lr"] for group in adam.param_groups]
        for group in adam.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        adam.step()
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate
            for parameter in group["params"]:
                parameter.grad = None
        optimizer._set_main_param_and_optimizer_states = partial(
            _set_with_step, optimizer, optimizer._set_main_param_and_optimizer_states
        )


def _set_with_step(optimizer: Any, set_states: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    group, order = optimizer.model_param_group_index_map[model_param]
    state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
    state["step"] = state["step"].clone()  # load_state_dict gives all parameters one tensor, which each would count up
    set_states(model_param, {"step": state["step"].clone(), **tensors})


def _state(trainer: Trainer, *, loading: bool, model_only: bool) -> dict[str, Any]:
    """The sharded state dict, keys as Megatron-LM has them."""
    model = {
        key: value
        for key, value in trainer.gpt.sharded_state_dict().items()
        if not key.endswith("_extra_state")  # of the FP8 recipe; empty here, absent from converted checkpoints
    }
    state: dict[str, Any] = {"model": model}
    if not model_only:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_OPTIMIZER_FORMAT)
        state["opt_param_scheduler"] = trainer.scheduler.state_dict()
    return state
