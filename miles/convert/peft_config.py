"""PEFT's adapter_config.json: what is taken of it, what is refused by name, and how one is written.

    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, …}   <->   AdapterShape(8, 16.0, …)

An adapter computes  y = W x + scale B A x  here, and nothing else. A setting that makes something
else of it is refused, and so is one that is not known and is set: what PEFT would compute with it
is not known either. docs/decisions/039-peft-settings.md says which are which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.architecture.adapter import AdapterShape
from miles.common import storage
from miles.common.checkpoint_folder import PEFT_CONFIG
from miles.common.shown import shown
from miles.common.untrusted_files import read_json
from miles.convert.path_safety import require_inside
from miles.errors import CheckpointError, SourceError

CONFIG = PEFT_CONFIG

_LARGEST_RANK = 1 << 16
"""Far beyond any adapter."""
_READ = (
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules"),
    *("rank_pattern", "alpha_pattern"),
)
_WITHOUT_EFFECT = (
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"),
    # Of training and of other ways to begin; `init_lora_weights` says whether one was taken.
    *("lora_dropout", "runtime_config", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "megatron_config", "megatron_core"),
    # Of settings that are refused where they are set.
    *("layers_pattern", "qalora_group_size", "ensure_weight_tying"),
)
"""Settings that change nothing of what a saved adapter computes."""
_EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # Others (pissa, olora, loftq, corda, …) change the base weights as they begin.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Settings with values of their own that are taken."""
_MEANINGS: Mapping[str, str] = {
    "use_dora": "DoRA, which scales each row of the sum",
    "modules_to_save": "whole modules trained beside the adapter",
    "trainable_token_indices": "rows of the embedding trained beside the adapter",
    "bias": "biases trained beside the adapter",
    "lora_bias": "biases of the adapter",
    "fan_in_fan_out": "weights that are stored the other way around",
    "layers_to_transform": "adapters of some layers only",
    "layer_replication": "layers that are repeated",
    "target_parameters": "adapters of parameters, such as those of experts",
    "rank_pattern": "projections of several ranks",
    "alpha_pattern": "projections of several scales",
    "peft_type": "an adapter of another kind",
    "task_type": "a model with another head",
    "init_lora_weights": "an adapter that belongs to a base which its start has changed",
}


@dataclass(frozen=True)
class PeftConfig:
    """The facts of an adapter_config.json about the tensors beside it."""

    where: str
    """the file"""
    rank: int
    alpha: float
    is_rank_stabilized: bool
    targets: tuple[str, ...]
    """the last part of each module's name in `target_modules`; empty where that is a pattern, or
    leaves some out"""


def read_config(url: str) -> PeftConfig:
    """Read the adapter_config.json of a folder (fsspec URL).

    Raises:
        CheckpointError: there is none; it is not JSON; a setting that is refused.
    """
    require_inside(url, CONFIG, url)
    where = storage.join(url, CONFIG)
    try:
        content = read_json(where, CheckpointError)
    except SourceError as error:
        raise CheckpointError(
            f"{error}; a folder in PEFT's format was expected, as save_pretrained writes it"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{where}: a JSON object was expected; found {type(content).__name__}"
        )

    for name in sorted(content):
        _require_known(where, name, content[name])
    rank = _rank_of(content, where)
    alpha = _alpha_of(content, where)
    for name, expected in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        _require_one_value(where, name, content.get(name), expected)

    is_rank_stabilized = content.get("use_rslora")
    if is_rank_stabilized is None:  # as PEFT takes it
        is_rank_stabilized = False
    if not isinstance(is_rank_stabilized, bool):
        raise _not_expected(where, "use_rslora", is_rank_stabilized, "true or false")
    return PeftConfig(where, rank, alpha, is_rank_stabilized, _targets_of(content, where))


def config_text(adapter: AdapterShape, base: str, dropout: float = 0.0) -> str:
    """Return the content of an adapter_config.json that PEFT's own loader takes.

    Args:
        base: the folder (fsspec URL) of the weights that the adapter belongs to.
        dropout: that it was trained with.
    """
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha

    content: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": _base_name(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.is_rank_stabilized,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _base_name(base: str) -> str:
    """Return the name by which PEFT finds a base: a path, or a model of the hub."""
    if base.startswith("hf://"):
        return base.removeprefix("hf://")
    return storage.filesystem(base)[1] if storage.is_local(base) else base


def _require_known(where: str, name: str, value: Any) -> None:
    """Refuse a setting that makes an adapter something else than a product of two matrices."""
    if name in _READ or name in _WITHOUT_EFFECT:
        return
    if name in _EXPECTED:
        is_taken = value in _EXPECTED[name]
    else:
        is_taken = value is None or value is False or value in ("", [], {})
    if is_taken:
        return

    meaning = _MEANINGS.get(name)
    raise CheckpointError(
        f"{where}: {name[:100]} is {shown(value)}: "
        f"{meaning or 'a setting that is not known here'}. Only adapters of plain LoRA or rsLoRA "
        "are read, which add scale B A to each weight: train one with that setting left out, or "
        "merge this one with PEFT (merge_and_unload) and begin from the merged weights"
    )


def _require_one_value(where: str, name: str, pattern: Any, expected: float) -> None:
    """Refuse ranks or alphas of single modules that are not those of all."""
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        raise _not_expected(where, name, pattern, "an object")
    for module, value in pattern.items():
        if value != expected or isinstance(value, bool):
            raise CheckpointError(
                f"{where}: {name} gives {shown(value)} to {module[:100]}, the others have "
                f"{expected:g}: {_MEANINGS[name]}. Here an adapter has one: train one with that "
                "setting left out, or merge this one with PEFT (merge_and_unload) and begin from "
                "the merged weights"
            )


def _rank_of(content: Mapping[str, Any], where: str) -> int:
    rank = content.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= _LARGEST_RANK:
        raise _not_expected(where, "r", rank, f"a rank from 1 to {_LARGEST_RANK:,}")
    return rank


def _alpha_of(content: Mapping[str, Any], where: str) -> float:
    alpha = content.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    try:
        if is_number and 0 < float(alpha) < math.inf:  # type: ignore[arg-type]
            return float(alpha)  # type: ignore[arg-type]
    except OverflowError:
        pass
    raise _not_expected(where, "lora_alpha", alpha, "a number above 0")


def _targets_of(content: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the projections that `target_modules` names."""
    modules = content.get("target_modules")
    if modules is None or isinstance(modules, str) or content.get("exclude_modules"):
        return ()
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise _not_expected(where, "target_modules", modules, "a list of names")
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in modules}))


def _not_expected(where: str, name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{where}: {name} is {shown(value)}; {expected} was expected")
