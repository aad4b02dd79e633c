"""The export of checkpoints to Hugging Face's format, where `--save-hf` asks for it.

begin    at the moment of a save: the ranks write their weights into a hidden folder, while the
         training waits
finish   when the checkpoint of that moment is complete: the folder takes its name

An export that the ranks cannot write (to a store, to a folder that not all of them see, to a disk
without room for it beside the checkpoint) is converted from the complete checkpoint by the driver.
The files are the same.

A LoRA run exports its adapter, in PEFT's format.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miles.architecture.adapter import adapter_parameters, total_adapter_parameters
from miles.architecture.config import ModelShape
from miles.architecture.families import parameters_of
from miles.architecture.sizes import total_parameters
from miles.common import atomic_folders, storage
from miles.common.atomic_folders import StagedFolder
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.errors import CheckpointError, ClusterError, MilesError, RunError, WriteError
from miles.train.config import TrainConfig
from miles.train.driver.group import TrainerGroup
from miles.train.driver.run_log import RunLog
from miles.train.export_target import STEP, is_exported, target_of

if TYPE_CHECKING:
    from miles.convert.export_plan import FilesPlan

_CHECKPOINT_BYTES = 16
"""Bytes of a checkpoint a parameter, at most: weights, masters, two moments."""


def remove_unfinished(config: TrainConfig) -> list[str]:
    """Remove what killed attempts left of their exports; return the folders."""
    if not config.save_hf or not storage.is_local(config.save_hf):
        return []
    path = storage.filesystem(config.save_hf)[1]
    return atomic_folders.remove_unfinished(glob.escape(path).replace(STEP, "*"))


def export_if_missing(
    config: TrainConfig, checkpoint_url: str, iteration: int, run_log: RunLog
) -> None:
    """Export the last checkpoint of a finished run if an interrupted attempt did not come to it."""
    is_there = is_exported(config.save_hf, iteration, is_adapter=config.lora.is_on)
    if config.save_hf and not is_there:
        _convert(config, checkpoint_url, target_of(config.save_hf, iteration), run_log)


@dataclass(frozen=True)
class _WrittenExport:
    """An export whose weights the ranks have written, in its hidden folder."""

    iteration: int
    target: str
    folder: StagedFolder
    plan: FilesPlan


class Exporter:
    """Exports the last checkpoint of a run, or each one.

    Args:
        num_steps: of the whole run.
        frozen: the weights beside the adapter of a LoRA run, which is all that it exports.
    """

    def __init__(
        self,
        config: TrainConfig,
        shape: ModelShape,
        group: TrainerGroup,
        run_log: RunLog,
        num_steps: int,
        frozen: SavedCheckpoint | None = None,
    ) -> None:
        self._config = config
        self._adapter = config.lora.adapter(shape)
        self._frozen = frozen
        self._shape = shape
        self._group = group
        self._run_log = run_log
        self._num_steps = num_steps
        self._written: _WrittenExport | None = None

    def begin(self, iteration: int) -> None:
        """Have the ranks write their weights of this moment, if its checkpoint is to be exported.

        Args:
            iteration: steps that the weights have seen; their checkpoint was begun just now.

        Raises:
            LostError: a rank was lost.
            RunError: a rank failed.
        """
        self.abandon()
        target = self._target_of(iteration)
        if target is None or not storage.is_local(target):
            return
        try:
            self._require_replaceable(target)
            folder = StagedFolder(Path(storage.filesystem(target)[1]))
        except (MilesError, OSError) as error:
            self._leave_to_driver(target, str(error))
            return

        try:
            plan = self._write(folder.path)
        except BaseException as error:
            folder.discard()
            if _ends_attempt(error):
                raise
            self._leave_to_driver(target, str(error))
        else:
            self._written = _WrittenExport(iteration, target, folder, plan)

    def finish(self, checkpoint_url: str, iteration: int) -> None:
        """Export a checkpoint that has become complete, if it is to be.

        Args:
            checkpoint_url: folder of the checkpoint.
            iteration: steps that it holds.

        Raises:
            MilesError: it could not be exported; the checkpoint stays.
        """
        target = self._target_of(iteration)
        if target is None:
            return
        storage.require_held(self._config.save)  # else the export is another run's
        written = self._written
        if written is None or written.iteration != iteration:
            _convert(self._config, checkpoint_url, target, self._run_log)
            return

        self._written = None
        try:
            self._require_replaceable(target)
            written.plan.complete(written.folder.path, self._config.data.encode.chat_template)
        except BaseException:
            written.folder.discard()
            raise
        written.folder.commit()
        self._run_log.report(_written_line(self._config, target))

    def abandon(self) -> None:
        """Remove what the ranks have written for a checkpoint that never became complete."""
        if self._written is not None:
            self._written.folder.discard()
            self._written = None

    def _require_replaceable(self, target: str) -> None:
        from miles.convert.megatron_to_hf import require_replaceable

        is_adapter = self._adapter is not None
        require_replaceable(target, self._config.hf_checkpoint, is_adapter=is_adapter)

    def _target_of(self, iteration: int) -> str | None:
        """Return the folder of a checkpoint's export; None where it has none."""
        save_hf = self._config.save_hf
        if save_hf and (iteration == self._num_steps or STEP in save_hf):
            return target_of(save_hf, iteration)
        return None

    def _write(self, folder: Path) -> FilesPlan:
        """Have the ranks write their weights into a folder that is empty; return its plan.

        Raises:
            CheckpointError: they cannot, and why.
            LostError: a rank was lost.
            RunError: a rank failed.
        """
        nodes = self._group.nodes_without(str(folder))
        if nodes:
            raise CheckpointError(f"{folder} is not the same folder on {', '.join(nodes)}")

        plan = self._plan()
        atomic_folders.require_room(folder, plan.num_bytes + self._pending_bytes(folder))
        plan.create(folder).close()

        parts = self._group.write_export(str(folder))
        for part in parts:
            if part.failure is not None:
                raise CheckpointError(part.failure.reason)
        num_bytes = sum(part.num_bytes for part in parts)
        if num_bytes != plan.num_bytes:
            raise CheckpointError(f"{folder}: the ranks wrote {num_bytes:,} bytes")
        return plan

    def _plan(self) -> FilesPlan:
        """Return the files of an export."""
        # torch is imported here because importing this module should not take seconds.
        from miles.convert.export_plan import ExportPlan
        from miles.convert.peft_adapter import AdapterPlan
        from miles.train.model.dtypes import DTYPES

        precision = self._config.precision
        assert precision is not None, "a run has chosen"
        hf_checkpoint, shape, adapter = self._config.hf_checkpoint, self._shape, self._adapter
        if adapter is None:
            own = {parameter.megatron: DTYPES[precision] for parameter in parameters_of(shape)}
            return ExportPlan(hf_checkpoint, shape, own)

        parameters = adapter_parameters(shape, adapter)
        own = {parameter.megatron: DTYPES[precision] for parameter in parameters}
        base = self._frozen.url if self._frozen and self._frozen.is_hugging_face else None
        return AdapterPlan(hf_checkpoint, shape, adapter, own, base=base)

    def _pending_bytes(self, folder: Path) -> int:
        """Return the room that the checkpoint which is being written needs on a folder's disk."""
        if not storage.is_local(self._config.save):
            return 0
        save = Path(storage.filesystem(self._config.save)[1])
        is_same_disk = save.stat().st_dev == folder.stat().st_dev
        if not is_same_disk:
            return 0
        if self._adapter is not None:
            return _CHECKPOINT_BYTES * total_adapter_parameters(self._shape, self._adapter)
        return _CHECKPOINT_BYTES * total_parameters(self._shape)

    def _leave_to_driver(self, target: str, reason: str) -> None:
        """Note why an export is converted from the checkpoint, once that is complete."""
        self._run_log.write(f"{target}: converted from the checkpoint, not by the ranks: {reason}")


def _ends_attempt(error: BaseException) -> bool:
    """Return whether an error is of the ranks, or none that a user can mend."""
    is_of_ranks = isinstance(error, (ClusterError, RunError)) and not isinstance(error, WriteError)
    return is_of_ranks or not isinstance(error, (MilesError, OSError))


def _convert(config: TrainConfig, checkpoint_url: str, target: str, run_log: RunLog) -> None:
    """Convert a complete checkpoint."""
    from miles.convert.megatron_to_hf import megatron_to_hf

    folder = megatron_to_hf(
        checkpoint_url,
        config.hf_checkpoint,
        target,
        chat_template=config.data.encode.chat_template,
    )
    run_log.report(_written_line(config, folder))


def _written_line(config: TrainConfig, folder: str) -> str:
    """Return the line of an export that is complete."""
    kind = "adapter, as PEFT writes it" if config.lora.is_on else "Hugging Face checkpoint"
    return f"{kind}  {folder}"
