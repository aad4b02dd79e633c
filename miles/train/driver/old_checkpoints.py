"""Removing old checkpoints, as `--keep-last` and `--keep-best` ask for it.

What cannot be removed ends no run: the newest checkpoint is safe, and the next one tries again.
"""

from __future__ import annotations

from miles.common.checkpoint_folder import Removal, remove_old
from miles.errors import LeaseError, MilesError
from miles.train.config import TrainConfig
from miles.train.driver.run_log import RunLog


class OldCheckpoints:
    """The checkpoints of a run that are not to be kept.

    Args:
        base_url: the frozen weights of a LoRA run, which stay; None: it has none.
    """

    def __init__(self, config: TrainConfig, run_log: RunLog, base_url: str | None = None) -> None:
        self._config = config
        self._run_log = run_log
        self._base_url = base_url
        self._has_failed = False

    def remove(self) -> None:
        """Remove those that are there; report it once if one of them cannot be removed.

        Raises:
            LeaseError: another run has taken the folder over.
        """
        config = self._config
        try:
            removal = remove_old(config.save, config.keep_last, config.keep_best, self._base_url)
        except LeaseError:
            raise
        except MilesError as error:  # the folder cannot be listed
            removal = Removal(failure=str(error))

        for folder in removal.removed:
            self._run_log.write(f"removed  {folder}")
        if removal.failure is not None and not self._has_failed:
            self._run_log.report(
                f"{removal.failure}. Old checkpoints stay for now; the run goes on, and tries again "
                "after each new one"
            )
        self._has_failed = removal.failure is not None
