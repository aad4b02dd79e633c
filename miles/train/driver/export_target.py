"""The folder of an export, where `--save-hf` asks for one."""

from __future__ import annotations

STEP = "{rollout_id}"
"""Stands in `--save-hf` for the number of steps; with it, every checkpoint is exported."""


def target_of(save_hf: str, iteration: int) -> str:
    """Return the folder for the export of the checkpoint of an iteration."""
    return save_hf.replace(STEP, str(iteration))
