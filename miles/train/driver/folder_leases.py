"""The leases of a run: on its checkpoints (`--save`) and, if it is another, on its `--output-dir`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console

from miles.common import lease, storage
from miles.common.lease import Lease
from miles.common.prose import Prose
from miles.train.config import TrainConfig


class FolderLeases:
    """The leases that a run holds from before it writes anything until its end."""

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = leases

    def require_not_taken(self) -> None:
        """Raise if a renewal has found that another run has a folder. Takes no time: call it often.

        Raises:
            LeaseError: says which run.
        """
        for held in self._leases:
            held.require_not_taken()


@contextlib.contextmanager
def hold_folders(config: TrainConfig, console: Console) -> Iterator[FolderLeases]:
    """Hold the folders that a run writes, until the context ends.

    Raises:
        LeaseError: another run has one of them.
        WriteError: nothing can be written there.
    """
    folders = {"--save": config.save}
    if not storage.is_same(config.run_dir, config.save):
        folders["--output-dir"] = config.run_dir

    def notify(text: str) -> None:
        console.print(Prose(f"  {text}"), soft_wrap=True)

    with contextlib.ExitStack() as held:
        leases = []
        for flag, folder in folders.items():
            leases.append(held.enter_context(lease.hold(folder, flag, "miles train", notify)))
        yield FolderLeases(leases)
