"""The folder of an export, where `--save-hf` asks for one.

--save-hf /hf                /hf       after the last step
--save-hf /hf/{rollout_id}   /hf/100   after the checkpoint of step 100, and after each other one
--save-hf /hf/{step}         refused: nothing takes its place
"""

from __future__ import annotations

from collections.abc import Mapping

from miles.errors import ConfigError

STEP = "{rollout_id}"
"""Stands in `--save-hf` for the number of steps; with it, every checkpoint is exported."""


def target_of(save_hf: str, iteration: int) -> str:
    """Return the folder for the export of the checkpoint of an iteration."""
    return save_hf.replace(STEP, str(iteration))


def is_exported(save_hf: str | None, iteration: int, *, is_adapter: bool) -> bool:
    """Return whether the export of the checkpoint of an iteration is there, if there is to be one.

    Args:
        save_hf: None: nothing is exported.
        is_adapter: it is an adapter in PEFT's format.
    """
    if save_hf is None:
        return True
    from miles.common import storage  # as in `require_export`
    from miles.common.checkpoint_folder import PEFT_CONFIG

    mark = PEFT_CONFIG if is_adapter else "config.json"
    return storage.exists(storage.join(target_of(save_hf, iteration), mark))


def require_export(save_hf: str | None, folders: Mapping[str, str]) -> None:
    """Check where the exports of a run go.

    Args:
        save_hf: may have `STEP` in it, and no other braces; None: nothing is exported.
        folders: the flags of the folders that the run writes into -> the folders; an export would
            replace one that is its own, or in it.

    Raises:
        ConfigError: names the flag and what to do.
    """
    for flag, folder in folders.items():
        if STEP in folder:
            raise ConfigError(
                f"{flag} {folder}: {STEP} stands for a number of steps in --save-hf alone; this "
                "folder is one for the whole run, and its checkpoints are named by their steps"
            )
    if save_hf is None:
        return
    if not {"{", "}"}.isdisjoint(save_hf.replace(STEP, "")):
        raise ConfigError(
            f"--save-hf {save_hf}: {STEP} is all that braces may hold here: it stands for the number "
            "of steps, and each checkpoint is exported; without it, that of the last step"
        )

    from miles.common import storage  # fsspec: a quarter of a second that most lines need not

    for flag, folder in folders.items():
        if folder and storage.is_within(folder, save_hf):
            raise ConfigError(
                f"--save-hf {save_hf} is {flag} {folder}, or holds it: an export has a folder of "
                "its own; give another one"
            )
