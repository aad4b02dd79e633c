"""The export of checkpoints to Hugging Face's format, where `--save-hf` asks for it."""

from __future__ import annotations

from miles.common import storage
from miles.train.config import TrainConfig
from miles.train.driver.run_log import RunLog

_STEP = "{rollout_id}"
"""Stands in `--save-hf` for the number of steps; with it, every checkpoint is exported."""


def require_exportable(config: TrainConfig) -> None:
    """Refuse a target before the run that could not be written after it.

    Raises:
        MilesError: the folder holds something else, or its URL a password.
    """
    from miles.convert.megatron_to_hf import require_replaceable

    if config.save_hf:
        require_replaceable(config.save_hf, config.hf_checkpoint)


def export_checkpoint(
    config: TrainConfig, checkpoint_url: str, iteration: int, run_log: RunLog, *, is_last: bool
) -> None:
    """Export a checkpoint if it is to be: the last one, or each one.

    Args:
        checkpoint_url: folder of the checkpoint.
        iteration: steps that it holds.
    """
    if config.save_hf and (is_last or _STEP in config.save_hf):
        _export(config, checkpoint_url, _target(config.save_hf, iteration), run_log)


def export_if_missing(
    config: TrainConfig, checkpoint_url: str, iteration: int, run_log: RunLog
) -> None:
    """Export the last checkpoint of a finished run if an interrupted attempt did not come to it."""
    if not config.save_hf:
        return
    target = _target(config.save_hf, iteration)
    if not storage.exists(storage.join(target, "config.json")):
        _export(config, checkpoint_url, target, run_log)


def _target(save_hf: str, iteration: int) -> str:
    return save_hf.replace(_STEP, str(iteration))


def _export(config: TrainConfig, checkpoint_url: str, target: str, run_log: RunLog) -> None:
    from miles.convert.megatron_to_hf import megatron_to_hf

    folder = megatron_to_hf(
        checkpoint_url,
        config.hf_checkpoint,
        target,
        chat_template=config.data.encode.chat_template,
    )
    run_log.report(f"Hugging Face checkpoint  {folder}")
