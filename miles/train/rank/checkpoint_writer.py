"""Writing a rank's part of a checkpoint while the training continues.

    begin           fork a process that writes the state of this moment       collective
    stage           WRITING until that process has ended, UPLOADING while     each rank alone
                    files are on their way to remote storage
    seal            make a checkpoint of what every rank wrote; start the     collective
                    uploads of a remote one
    finish_upload   tell whether this rank's files have arrived               each rank alone

Then the driver names the checkpoint in the tracker (`write_tracker`). Before that, no
run resumes from it. Until `seal`, a local checkpoint is a folder `.saving-iter_0000100-1f3c…`. A
remote one is staged on each rank's own disk, and each rank uploads what it wrote.
"""

from __future__ import annotations

import inspect
import json
import secrets
import shutil
import socket
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from miles.common import checkpoint_folder, storage
from miles.common.checkpoint_tracker import folder_name, write_tracker
from miles.errors import CheckpointError, MilesError
from miles.train.rank import checkpoint_load, optimizer_state, writer_processes
from miles.train.rank.base_weights import BaseWeights
from miles.train.rank.trainer import Trainer
from miles.train.types import SaveFailure, SaveStage

_SMALL_FILES_BYTES = 4 << 20
"""Room for what a checkpoint has beside its tensors: plans, names, the common part."""
_RANK_0_KNOWS = SaveFailure("rank 0 has the reason")
"""The failure of a rank that does not know the reason."""

T = TypeVar("T")


@dataclass
class _PendingSave:
    """A checkpoint that is being written."""

    url: str
    """the folder of all checkpoints"""
    iteration: int
    extra: dict[str, Any]
    folder: Path
    """the folder that this rank writes into"""
    calls: Any
    """Megatron's queue of asynchronous calls, with this save in it"""
    upload: threading.Thread | None = None
    upload_failure: SaveFailure | None = None

    @property
    def name(self) -> str:
        """Return the name of the checkpoint's folder."""
        return folder_name(self.iteration)


class CheckpointWriter:
    """Writes one rank's part of the checkpoints, one checkpoint at a time.

    Args:
        base: the frozen weights beside the adapter, where one is trained.
    """

    def __init__(self, trainer: Trainer, base: BaseWeights | None = None) -> None:
        self._trainer = trainer
        self._base = base
        self._pending: _PendingSave | None = None

    def begin(
        self, url: str, iteration: int, extra: dict[str, Any], *, model_only: bool = False
    ) -> SaveFailure | None:
        """Take the state of this moment. The training may continue when this returns.

        Args:
            url: the folder of all checkpoints.
            iteration: steps that the state holds.
            extra: JSON for `miles.json`, of the same moment.
            model_only: leave out the optimizer, which has no state before its first step.

        Returns:
            why nothing was begun, equal on all ranks; None: it was.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        assert self._pending is None, "one checkpoint at a time"
        extra = {**extra, **self._trainer.extra_state()}
        with (
            writer_processes.lost_with_their_results(self._trainer.rank),
            self._forks_without_optimizer(),
        ):
            writer_processes.share_results()
        state = checkpoint_load.state_to_save(
            self._trainer, iteration, extra, model_only=model_only
        )

        folder = self._create_folder(url, iteration)
        if isinstance(folder, SaveFailure):
            failure = self._agree_on(folder)
        else:
            failure = self._agree_on(None) or self._lacking_room(
                folder, checkpoint_load.num_local_bytes(state)
            )
        if failure is not None:
            if isinstance(folder, Path):
                shutil.rmtree(folder, ignore_errors=True)
            return failure

        assert isinstance(folder, Path), "one rank's failure is every rank's"
        calls = AsyncCallsQueue()
        options: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            # megatron-core 0.19: its default needs a package of NVIDIA's, this is what 0.16.1 does.
            options["async_strategy"] = "mcore"
        request = dist_checkpointing.save(
            state,
            str(folder),
            async_sharded_save=True,
            content_metadata=checkpoint_load.CONTENT_FORMAT,
            **options,
        )
        write = request.async_fn and writer_processes.ending_with_its_files(request.async_fn)
        with self._forks_without_optimizer():
            calls.schedule_async_request(request._replace(async_fn=write))
        content = {**extra, **self._adapter_facts()}
        self._pending = _PendingSave(url, iteration, content, folder, calls)
        return None

    def _forks_without_optimizer(self) -> AbstractContextManager[None]:
        """Leave what lies in the machine's memory of the optimizer out of forked processes."""
        tensors = optimizer_state.host_tensors(self._trainer.optimizer)
        return writer_processes.left_out_of_forks(tensors)

    def stage(self) -> SaveStage:
        """Return how far this rank is with its part.

        Raises:
            LostError: a process that writes it was killed.
        """
        pending = self._require_pending()
        if pending.upload is not None:
            return SaveStage.UPLOADING if pending.upload.is_alive() else SaveStage.UPLOADED

        writer = pending.calls.async_calls[0].async_caller
        process = writer.process
        has_written = writer.is_current_async_call_done(blocking=False, no_dist=True)
        writer_processes.require_well(process, self._trainer.rank)
        return SaveStage.WRITTEN if has_written else SaveStage.WRITING

    def seal(self) -> SaveFailure | None:
        """Make a checkpoint of the files, once every rank has written.

        After a failure, its files are removed.

        Returns:
            why it failed, equal on all ranks; None: it did not.

        Raises:
            LostError: a process that this needs was killed.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        pending = self._require_pending()
        failure = None
        try:
            with writer_processes.lost_with_their_results(self._trainer.rank):
                pending.calls.maybe_finalize_async_calls(blocking=True)
        except CheckpointException as error:  # raised on every rank, with the reasons on rank 0
            reasons = [str(rank_failure[0]) for rank_failure in error.failures.values()]
            failure = SaveFailure(reasons[0]) if reasons else _RANK_0_KNOWS
        if failure is None and self._trainer.rank == 0:
            failure = _complete_folder(pending)

        failure = self._agree_on(failure)
        if failure is not None:
            self.abandon()
        elif storage.is_local(pending.url):
            self._pending = None
        else:
            pending.upload = threading.Thread(target=_upload, args=(pending,), daemon=True)
            pending.upload.start()
        return failure

    def finish_upload(self) -> SaveFailure | None:
        """End the upload, once the files of every rank have arrived or failed to.

        Returns:
            why this rank's upload failed; None: it did not.
        """
        pending = self._require_pending()
        self.abandon()
        return pending.upload_failure

    def abandon(self) -> None:
        """Forget the pending checkpoint, and remove what is staged of it."""
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        pending.calls.close(abort=True)
        if self._trainer.rank == 0 or not storage.is_local(pending.url):
            shutil.rmtree(pending.folder, ignore_errors=True)

    def _require_pending(self) -> _PendingSave:
        assert self._pending is not None, "no checkpoint was begun"
        return self._pending

    def _adapter_facts(self) -> dict[str, Any]:
        """Return what `miles.json` says of an adapter: that no whole model is in the checkpoint."""
        if self._trainer.adapter is None:
            return {}
        facts: dict[str, Any] = {checkpoint_folder.ADAPTER: self._trainer.adapter.to_json()}
        if self._base is not None:
            facts[checkpoint_folder.BASE] = self._base.to_json()
        return facts

    def _create_folder(self, url: str, iteration: int) -> Path | SaveFailure:
        """Create the folder to write into: one for all ranks if it is local, else one for each."""
        if not storage.is_local(url):
            try:
                return Path(tempfile.mkdtemp(prefix="miles-save-"))
            except OSError as error:
                return SaveFailure(str(error))

        created: list[Path | SaveFailure | None] = [None]
        if self._trainer.rank == 0:
            root = Path(storage.filesystem(url)[1])
            prefix = f"{checkpoint_folder.SAVING}{folder_name(iteration)}"
            created[0] = _new_folder(root / f"{prefix}-{secrets.token_hex(4)}")
        torch.distributed.broadcast_object_list(created, src=0)
        assert created[0] is not None
        return created[0]

    def _agree_on(self, failure: SaveFailure | None) -> SaveFailure | None:
        """Return the same failure on all ranks, with a reason if any has one; None without any."""
        failures = [of_rank for of_rank in self._gather(failure) if of_rank is not None]
        with_reason = [of_rank for of_rank in failures if of_rank != _RANK_0_KNOWS]
        return next(iter(with_reason + failures), None)

    def _lacking_room(self, folder: Path, num_bytes: int) -> SaveFailure | None:
        """Return which disk has no room for what the ranks are about to write; None: all have."""
        by_disk: defaultdict[tuple[str, int], list[_DiskRequest]] = defaultdict(list)
        for request in self._gather(_DiskRequest.of(folder, num_bytes)):
            by_disk[request.host, request.device].append(request)

        for requests in by_disk.values():
            failure = _refuse(requests, folder.parent)
            if failure is not None:
                return failure
        return None

    def _gather(self, own: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        gathered: list[Any] = [None] * self._trainer.layout.world_size
        torch.distributed.all_gather_object(gathered, own)
        return gathered


@dataclass(frozen=True)
class _DiskRequest:
    """The bytes that a rank is about to write, and the disk that it writes to."""

    host: str
    device: int
    num_bytes: int
    free_bytes: int
    failure: SaveFailure | None = None

    @classmethod
    def of(cls, folder: Path, num_bytes: int) -> _DiskRequest:
        """Return the request of this rank; it has a failure if the rank does not see the folder."""
        host = socket.gethostname()
        try:
            free_bytes = shutil.disk_usage(folder).free
            return cls(host, folder.stat().st_dev, num_bytes, free_bytes)
        except OSError as error:
            failure = SaveFailure(f"{host} does not see the folder that rank 0 made: {error}")
            return cls(host, -1, num_bytes, 0, failure)


def _refuse(requests: Sequence[_DiskRequest], folder: Path) -> SaveFailure | None:
    """Return why one disk cannot take what the ranks write to it; None: it can."""
    first = requests[0]
    if first.failure is not None:
        return first.failure
    num_bytes = sum(request.num_bytes for request in requests) + _SMALL_FILES_BYTES
    if num_bytes <= first.free_bytes:
        return None
    return SaveFailure(
        f"no space left on device: {num_bytes / 1e6:,.1f} MB are needed in {folder} of "
        f"{first.host}, {first.free_bytes / 1e6:,.1f} MB are free",
        "Make room there",
    )


def _new_folder(folder: Path) -> Path | SaveFailure:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return SaveFailure(str(error))
    return folder


def _complete_folder(pending: _PendingSave) -> SaveFailure | None:
    """Add the small files of rank 0; give a local checkpoint its name."""
    try:
        _write_common_part(pending.folder)
        storage.write_text(
            str(pending.folder / checkpoint_folder.EXTRA),
            json.dumps(pending.extra, indent=1, sort_keys=True),
        )
        if storage.is_local(pending.url):
            _rename(pending.folder, pending.name)
    except (MilesError, OSError) as error:
        return SaveFailure(str(error))
    return None


def _write_common_part(folder: Path) -> None:
    """Write the file of what is no tensor, where Megatron has put that among the tensors.

    megatron-core 0.19 does so, and reads either form; older versions read the file.
    """
    from megatron.core import dist_checkpointing

    file = folder / "common.pt"
    if not file.exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(folder)), file)


def _rename(folder: Path, name: str) -> None:
    """Give a folder its final name, in place of a checkpoint that has it.

    There is one if the run went back to an earlier checkpoint since.
    """
    final = folder.parent / name
    old = folder.with_name(f"{folder.name}-old")
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _upload(pending: _PendingSave) -> None:
    """Upload this rank's files, in a thread; `finish_upload` returns what went wrong."""
    try:
        storage.upload_folder(pending.folder, storage.join(pending.url, pending.name))
    except MilesError as error:
        pending.upload_failure = SaveFailure(str(error))
    except Exception as error:
        pending.upload_failure = SaveFailure(f"{type(error).__name__}: {error}")


def save(
    trainer: Trainer,
    url: str,
    iteration: int,
    extra: dict[str, Any],
    *,
    model_only: bool = False,
    base: BaseWeights | None = None,
) -> str:
    """Write a checkpoint into a local folder, wait for it, and return its folder. Collective.

    Raises:
        CheckpointError: it could not be written.
    """
    writer = CheckpointWriter(trainer, base)
    failure = writer.begin(url, iteration, extra, model_only=model_only) or writer.seal()
    if failure is not None:
        raise CheckpointError(
            f"{url}: the checkpoint of step {iteration} was not written: {failure.reason}"
        )
    if trainer.rank == 0:
        write_tracker(url, iteration)
    torch.distributed.barrier()
    return storage.join(url, folder_name(iteration))
