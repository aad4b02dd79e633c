"""Where metrics go: metrics.jsonl in the run's folder always; TensorBoard and Weights & Biases where asked."""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from miles.common import json_lines, run_folder, storage
from miles.common.redact import redact
from miles.errors import ConfigError
from miles.train.config import LoggingConfig
from miles.train.driver.metrics import Metrics

_WITHOUT_LOGIN = "--wandb-mode offline needs neither login nor network; wandb sync sends it later"


class Board(Protocol):
    """Somewhere that draws curves."""

    def write(self, numbers: Mapping[str, float]) -> None:
        """A step's finite numbers, `step` among them."""

    def close(self, *, failed: bool) -> None:
        """The run's end, or what broke it off."""


class MetricsLog:
    """Appends to metrics.jsonl, and sends the same to the boards; in a `with`, these hear how it ended.

    Args:
        url: the run's folder. Remote: the file is kept in memory and written whole at each checkpoint.
        num_lines: of an existing file that are kept; what a killed run wrote beyond its checkpoint comes again.
        boards: of `open_boards`.
    """

    def __init__(self, url: str, num_lines: int, boards: list[Board]) -> None:
        self._path, self._boards = storage.join(url, run_folder.METRICS), boards
        self._lines = json_lines.read_lines(self._path)[:num_lines]
        json_lines.write(self._path, self._lines)
        local = storage.is_local(url)
        self._stream = open(storage.filesystem(self._path)[1], "a", buffering=1) if local else None  # noqa: SIM115

    @property
    def num_lines(self) -> int:
        return len(self._lines)

    def write(self, metrics: Metrics) -> None:
        """A step's line; a number that is not finite is null in it."""
        finite = {
            key: value
            for key, value in metrics.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        line = json.dumps({key: finite.get(key) for key in metrics})
        self._lines.append(line)
        if self._stream:
            self._stream.write(line + "\n")
        numbers = {key: value for key, value in finite.items() if not isinstance(value, str)}
        for board in self._boards:
            board.write(numbers)

    def flush(self) -> None:
        if not self._stream:
            json_lines.write(self._path, self._lines)

    def close(self, *, failed: bool = False) -> None:
        self.flush()
        if self._stream:
            self._stream.close()
        for board in self._boards:
            board.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=error is not None)


def open_boards(
    config: LoggingConfig, url: str, first_step: int, settings: Mapping[str, Any]
) -> list[Board]:
    """The boards that are asked for.

    Args:
        url: the run's folder.
        first_step: where this start begins; what a board has of it and later steps is hidden.
        settings: of the run, for those who look at it; passwords in URLs are cut out.

    Raises:
        ConfigError: a package, a login or a local folder that is missing, or a board that does not answer.
    """
    boards: list[Board] = []
    if config.use_tensorboard:
        boards.append(_TensorBoard(url, first_step))
    if config.use_wandb:
        boards.append(_Wandb(config, url, first_step, settings))
    return boards


class _TensorBoard:
    def __init__(self, url: str, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--use-tensorboard needs its package: pip install miles[tensorboard]"
            ) from error
        if not storage.is_local(url):
            raise ConfigError(
                f"--use-tensorboard writes into the run's folder: give a local --output-dir, not {url}"
            )
        folder = storage.filesystem(storage.join(url, run_folder.TENSORBOARD))[1]
        self._writer = SummaryWriter(folder, purge_step=first_step)

    def write(self, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(numbers["step"]))

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases; a training that goes on from a checkpoint goes on in the same one."""

    def __init__(
        self, config: LoggingConfig, url: str, first_step: int, settings: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--use-wandb needs its package: pip install miles[wandb]") from error
        mode = config.wandb_mode or os.environ.get("WANDB_MODE") or "online"
        local = storage.is_local(url)
        if mode in ("offline", "dryrun") and not local:  # wandb knows two names for it
            raise ConfigError(
                f"--wandb-mode offline writes into the run's folder: give a local --output-dir, not {url}"
            )
        path = storage.join(url, run_folder.WANDB_ID)
        if first_step == 0 or not storage.exists(path):
            storage.write_text(path, secrets.token_hex(4))
        self._folder = None if local else tempfile.TemporaryDirectory(prefix="miles-wandb-")
        try:
            if mode == "online":
                wandb.setup(settings=wandb.Settings(silent=True))
            # With `prompt` it would ask on the terminal. `verify` finds out in 10 seconds that a key is wrong or that
            # no server answers, `init` in 90.
            if mode == "online" and not wandb.login(prompt=False, verify=True):
                raise ConfigError(
                    f"--use-wandb needs a login: WANDB_API_KEY, or wandb login. {_WITHOUT_LOGIN}"
                )
            self._run = wandb.init(
                project=config.wandb_project,
                group=config.wandb_group,
                id=storage.read_text(path).strip(),
                name=url.rstrip("/").rsplit("/", 1)[-1],
                resume="allow",
                dir=self._folder.name if self._folder else storage.filesystem(url)[1],
                mode=mode,  # type: ignore[arg-type]
                config=_redacted(settings),
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_code=True,
                    disable_git=True,
                    save_code=False,
                    # It holds the command line as it was typed, and a URL there may have a password; seen in 0.31.
                    x_disable_meta=True,
                ),
            )
        except (
            wandb.Error,
            ValueError,
        ) as error:  # ValueError: of a setting, such as a WANDB_MODE that is none
            raise ConfigError(
                f"--use-wandb: {redact(str(error)).rstrip('.')}. {_WITHOUT_LOGIN}"
            ) from error
        # Not wandb's own count: steps that come again after a restart would be behind it, and be dropped.
        self._run.define_metric("*", step_metric="step")

    def write(self, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if self._folder:
            self._folder.cleanup()


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item) for item in value]
    return value
