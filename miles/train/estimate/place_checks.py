"""The places that a run writes into, and the packages of its sinks, looked at before a start."""

from __future__ import annotations

import importlib.util
import os
import posixpath
import shutil
from collections.abc import Iterator
from pathlib import Path

from miles.architecture.adapter import total_adapter_parameters
from miles.architecture.config import ModelShape
from miles.architecture.sizes import total_parameters
from miles.common import storage
from miles.common.writable import existing_part, require_writable
from miles.errors import ConfigError
from miles.train.config import TrainConfig
from miles.train.estimate.memory import state_bytes
from miles.train.export_target import target_of
from miles.train.logging_config import LoggingConfig
from miles.train.precision import Precision

OFFLINE_MODES = ("offline", "dryrun")
"""wandb has two names for it."""


def places(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield each flag that names a folder to write into, with the folder."""
    yield "--save", config.save
    if not storage.is_same(config.run_dir, config.save):
        yield "--output-dir", config.run_dir
    if config.save_hf:
        yield "--save-hf", _export_place(config.save_hf)
    if config.logging.use_wandb and config.logging.wandb_dir:
        yield "--wandb-dir", config.logging.wandb_dir


def require_place(flag: str, url: str) -> None:
    """Refuse a place that cannot be written into (`require_writable`)."""
    require_writable(url, flag)


def require_sinks(config: LoggingConfig, run_dir: str) -> None:
    """Refuse sinks whose package is missing, or that cannot write into the run folder.

    Raises:
        ConfigError: says what to install, or which flag to give.
    """
    if config.use_tensorboard:
        _require_package("tensorboard", "--use-tensorboard")
        if not storage.is_local(run_dir):
            raise ConfigError(
                "--use-tensorboard writes into the run folder: give a local --output-dir, not "
                f"{run_dir}"
            )

    if config.use_wandb:
        _require_package("wandb", "--use-wandb")
        is_offline = wandb_mode(config) in OFFLINE_MODES
        if is_offline and not config.wandb_dir and not storage.is_local(run_dir):
            raise ConfigError(
                "--wandb-mode offline writes into the run folder: give a local --output-dir, not "
                f"{run_dir}, or a --wandb-dir"
            )


def wandb_mode(config: LoggingConfig) -> str:
    """Return the mode of Weights & Biases: that of the flag, else of the environment."""
    return config.wandb_mode or os.environ.get("WANDB_MODE") or "online"


def require_exportable(config: TrainConfig) -> None:
    """Refuse a folder for the export that could not be written after the run.

    Raises:
        MilesError: the folder holds something else, or its URL a password.
    """
    # torch is imported there, which takes seconds.
    if config.save_hf:
        from miles.convert.megatron_to_hf import require_replaceable

        require_replaceable(config.save_hf, config.hf_checkpoint, is_adapter=config.lora.is_on)


def room_notice(config: TrainConfig, shape: ModelShape) -> str | None:
    """Return a sentence if the disk of `--save` has no room for one checkpoint; else None."""
    if not storage.is_local(config.save):
        return None

    precision = config.precision or Precision.BF16
    state = state_bytes(precision, config.optimizer)
    adapter = config.lora.adapter(shape)
    num_trained = total_parameters(shape)
    if adapter is not None:  # its checkpoints hold nothing else
        num_trained = total_adapter_parameters(shape, adapter)
    num_bytes = num_trained * (precision.num_bytes + state.device + state.host)

    folder = existing_part(Path(storage.filesystem(config.save)[1]))
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= num_bytes:
        return None
    return (
        f"a checkpoint takes about {num_bytes / 1e9:,.3g} GB, and the disk of --save {config.save} "
        f"has {free_bytes / 1e9:,.3g} GB free: make room before the first one"
    )


def _require_package(name: str, flag: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"{flag} needs its package: pip install miles[{name}]")


def _export_place(save_hf: str) -> str:
    """Return where an export is written: a local one beside its folder, whose place it takes."""
    if storage.is_local(save_hf):
        return posixpath.dirname(save_hf.rstrip("/")) or "."
    return target_of(save_hf, 0)
