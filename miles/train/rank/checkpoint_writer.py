"""Writing a checkpoint beside the training: a rank's part of it.

    begin          the state at this moment goes to a process that is forked from this one       collective
    stage          WRITING until that process has ended, UPLOADING while files are on their way  each rank by itself
    seal           what every rank wrote becomes a checkpoint; of a remote one, uploads begin    collective
    end_uploads    of a remote one: whether this rank's files have arrived                       each rank by itself

Then the driver names it in the tracker (`checkpoint.publish`), and only then it is one that a run goes on from. Until
`seal` a local checkpoint is a folder `.saving-iter_0000100-1f3c…`. A remote one is staged on each rank's own disk, and
each rank uploads what it wrote.
"""

from __future__ import annotations

import ctypes
import functools
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from miles.common import checkpoint_folder, storage
from miles.common.checkpoint_tracker import folder_name
from miles.errors import CheckpointError, MilesError
from miles.train.rank import checkpoint_load
from miles.train.rank.trainer import Trainer

WRITING, WRITTEN, UPLOADING, UPLOADED = "writing", "written", "uploading", "uploaded"
_SMALL_FILES_BYTES = 4 << 20
"""What a checkpoint may take beside its tensors: plans, names, the common part."""
_SEE_RANK_0 = "see rank 0"


@dataclass
class _Save:
    """A checkpoint on its way."""

    url: str
    """the folder of all checkpoints"""
    iteration: int
    extra: dict[str, Any]
    folder: Path
    """into which this rank writes"""
    calls: Any
    """Megatron's queue, with this one call in it"""
    upload: threading.Thread | None = None
    failed: list[str] = field(default_factory=list)
    """why the upload failed"""

    @property
    def name(self) -> str:
        return folder_name(self.iteration)


class Saver:
    """Of one rank; one checkpoint at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._save: _Save | None = None

    def begin(
        self, url: str, iteration: int, extra: dict[str, Any], *, model_only: bool = False
    ) -> str:
        """Takes the state as it is now; the training may go on when this returns.

        Args:
            extra: JSON for `miles.json`, of the same moment.
            model_only: leave out the optimizer, which has no state before its first step.

        Returns:
            why nothing was begun, the same on every rank; empty: it was.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        assert self._save is None, "one checkpoint at a time"
        _share_results()
        state = checkpoint_load.state_to_save(
            self._trainer, iteration, extra, model_only=model_only
        )
        folder, problem = self._make_folder(url, iteration)
        if problem := self._agreed(problem) or self._room(
            folder, checkpoint_load.num_local_bytes(state)
        ):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return problem
        assert folder is not None
        calls = AsyncCallsQueue()
        calls.schedule_async_request(
            dist_checkpointing.save(state, str(folder), async_sharded_save=True)
        )
        self._save = _Save(url, iteration, extra, folder, calls)
        return ""

    def stage(self) -> str:
        """Where this rank's part stands: `WRITING`, `WRITTEN`, `UPLOADING` or `UPLOADED`."""
        save = self._save
        assert save is not None
        if save.upload is not None:
            return UPLOADING if save.upload.is_alive() else UPLOADED
        done = save.calls.async_calls[0].async_caller.is_current_async_call_done(
            blocking=False, no_dist=True
        )
        return WRITTEN if done else WRITING

    def seal(self) -> str:
        """Once every rank has written: makes a checkpoint of the files. On an error nothing is left of it.

        Returns:
            why it failed, the same on every rank; empty: it did not.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        save = self._save
        assert save is not None
        problem = ""
        try:
            save.calls.maybe_finalize_async_calls(blocking=True)
        except CheckpointException as error:  # on every rank; the reasons are on rank 0
            problem = next((str(failure[0]) for failure in error.failures.values()), _SEE_RANK_0)
        if not problem and self._trainer.rank == 0:
            problem = _finish(save)
        if problem := self._agreed(problem):
            self.give_up()
        elif storage.is_local(save.url):
            self._save = None
        else:
            save.upload = threading.Thread(target=_upload, args=(save,), daemon=True)
            save.upload.start()
        return problem

    def end_uploads(self) -> str:
        """Once every rank has uploaded, or failed to.

        Returns:
            why this rank did; empty: it did not.
        """
        save = self._save
        assert save is not None
        self.give_up()
        return save.failed[0] if save.failed else ""

    def give_up(self) -> None:
        """Forgets the checkpoint on its way, and what was staged of it."""
        save, self._save = self._save, None
        if save is not None:
            save.calls.close(abort=True)
            if self._trainer.rank == 0 or not storage.is_local(save.url):
                shutil.rmtree(save.folder, ignore_errors=True)

    def _make_folder(self, url: str, iteration: int) -> tuple[Path | None, str]:
        """A new folder to write into; where the checkpoints are local, the same one on every rank."""
        made: list[Any] = [None, ""]
        try:
            if not storage.is_local(url):
                return Path(tempfile.mkdtemp(prefix="miles-save-")), ""
            if self._trainer.rank == 0:
                root = Path(storage.filesystem(url)[1])
                made[0] = str(
                    root
                    / f"{checkpoint_folder.SAVING}{folder_name(iteration)}-{secrets.token_hex(4)}"
                )
                Path(made[0]).mkdir(parents=True)
        except OSError as error:
            made = [None, str(error)]
        if storage.is_local(url):
            torch.distributed.broadcast_object_list(made, src=0)
        return (Path(made[0]) if made[0] else None), made[1]

    def _agreed(self, problem: str) -> str:
        """The first rank's that has one."""
        return next((one for one in self._gathered(problem) if one and one != _SEE_RANK_0), "")

    def _room(self, folder: Path | None, num_bytes: int) -> str:
        """Why what all ranks are about to write does not fit; empty: it does."""
        assert folder is not None
        by_disk: dict[tuple[str, int], list[_Request]] = {}
        for request in self._gathered(_Request.of(folder, num_bytes)):
            by_disk.setdefault((request.host, request.device), []).append(request)
        for requests in by_disk.values():
            first, need = (
                requests[0],
                sum(request.num_bytes for request in requests) + _SMALL_FILES_BYTES,
            )
            if first.problem:
                return first.problem
            if need > first.free_bytes:
                return (
                    f"no space left on device: {need / 1e6:,.1f} MB are needed in {folder.parent} of {first.host}, "
                    f"{first.free_bytes / 1e6:,.1f} MB are free"
                )
        return ""

    def _gathered(self, mine: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._trainer.layout.world_size
        torch.distributed.all_gather_object(gathered, mine)
        return gathered


@dataclass(frozen=True)
class _Request:
    """What a rank is about to write, and where."""

    host: str
    device: int
    num_bytes: int
    free_bytes: int
    problem: str = ""

    @classmethod
    def of(cls, folder: Path, num_bytes: int) -> _Request:
        host = socket.gethostname()
        try:
            return cls(host, folder.stat().st_dev, num_bytes, shutil.disk_usage(folder).free)
        except OSError as error:
            return cls(
                host, -1, num_bytes, 0, f"{host} does not see the folder that rank 0 made: {error}"
            )


def _finish(save: _Save) -> str:
    """Rank 0's small file, and of a local checkpoint the name; why it failed, or nothing."""
    try:
        storage.write_text(
            str(save.folder / checkpoint_folder.EXTRA),
            json.dumps(save.extra, indent=1, sort_keys=True),
        )
        if storage.is_local(save.url):
            final = save.folder.parent / save.name
            old = save.folder.with_name(f"{save.folder.name}-old")
            if final.exists():  # of a run that has gone back to an earlier checkpoint since
                final.rename(old)
            save.folder.rename(final)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        return str(error)
    return ""


def _upload(save: _Save) -> None:
    """This rank's files."""
    try:
        storage.upload_folder(save.folder, storage.join(save.url, save.name))
    except Exception as error:  # of a thread: said by `end_uploads`
        save.failed.append(
            str(error) if isinstance(error, MilesError) else f"{type(error).__name__}: {error}"
        )


@functools.cache
def _share_results() -> None:
    """Once a process: how the forked writer tells its results, and that it ends with this process.

    megatron-core 0.16.1 starts a manager by `spawn` for it, which outlives a rank that is killed. A forked one does
    not: of what is forked from here, the kernel kills each process when its parent dies.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if sys.platform == "linux":
        os.register_at_fork(after_in_child=_die_with_parent)
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def save(
    trainer: Trainer, url: str, iteration: int, extra: dict[str, Any], *, model_only: bool = False
) -> str:
    """Writes a checkpoint into a local folder and waits for it; collective over all ranks. Returns its folder.

    Raises:
        CheckpointError: it could not be written.
    """
    saver = Saver(trainer)
    if problem := saver.begin(url, iteration, extra, model_only=model_only) or saver.seal():
        raise CheckpointError(
            f"{url}: the checkpoint of step {iteration} was not written: {problem}"
        )
    if trainer.rank == 0:
        checkpoint_folder.publish(url, iteration)
    torch.distributed.barrier()
    return storage.join(url, folder_name(iteration))
