"""The sinks of metrics: always metrics.jsonl, on request TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from miles.common import json_lines, run_folder, storage, write_guard
from miles.common.redact import redact
from miles.common.secret import Secret
from miles.errors import ConfigError
from miles.train.driver.metrics import Metrics
from miles.train.logging_config import LoggingConfig

_WITHOUT_LOGIN = "--wandb-mode offline needs neither login nor network; wandb sync sends it later"

_KEY_VARIABLE = "WANDB_API_KEY"


class Sink(Protocol):
    """A place that shows metrics as curves."""

    def write(self, numbers: Mapping[str, float]) -> None:
        """Add the finite numbers of a step, `step` among them."""

    def close(self, *, failed: bool) -> None:
        """End the run there, and say whether it failed."""


class MetricsLog:
    """Appends to metrics.jsonl, and sends the same to the sinks.

    As a context manager, it tells the sinks whether an error ended the run.

    Args:
        run_dir: the run folder (fsspec URL). If it is remote, the lines are kept in memory, and
            `flush` writes the file.
        num_lines: lines of an existing file to keep; a killed run wrote more than its checkpoint
            has, and those steps come again.
        sinks: of `open_sinks`.
    """

    def __init__(self, run_dir: str, num_lines: int, sinks: Sequence[Sink]) -> None:
        self._path = storage.join(run_dir, run_folder.METRICS)
        self._place = storage.place_of(self._path)
        self._sinks = sinks
        self._lines = json_lines.read_lines(self._path)[:num_lines]
        json_lines.write(self._path, self._lines)
        self._stream = None
        if storage.is_local(run_dir):
            local_path = storage.filesystem(self._path)[1]
            self._stream = open(local_path, "a", buffering=1)  # noqa: SIM115

    @property
    def num_lines(self) -> int:
        """Return the number of lines so far."""
        return len(self._lines)

    def write(self, metrics: Metrics) -> None:
        """Add the line of a step. A number that is not finite is null, and no sink gets it."""
        finite: Metrics = {}
        for key, value in metrics.items():
            if not isinstance(value, float) or math.isfinite(value):
                finite[key] = value
        line = json.dumps({key: finite.get(key) for key in metrics})

        self._lines.append(line)
        if self._stream:
            write_guard.require(self._place)
            self._stream.write(line + "\n")
        numbers = {key: value for key, value in finite.items() if not isinstance(value, str)}
        for sink in self._sinks:
            sink.write(numbers)

    def flush(self) -> None:
        """Write the file if it is remote; a local one has each line at once."""
        if not self._stream:
            json_lines.write(self._path, self._lines)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the sinks."""
        self.flush()
        if self._stream:
            self._stream.close()
        for sink in self._sinks:
            sink.close(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=error is not None)


def open_sinks(
    config: LoggingConfig, run_dir: str, first_step: int, settings: Mapping[str, Any]
) -> list[Sink]:
    """Open the sinks that are asked for.

    Args:
        run_dir: the run folder.
        first_step: of this attempt. Points of this step and later ones, of an earlier attempt, are
            hidden.
        settings: of the run, to be shown there; passwords in URLs are cut out.

    Raises:
        ConfigError: a package, a login or a local folder is missing, or a sink does not answer.
    """
    sinks: list[Sink] = []
    if config.use_tensorboard:
        sinks.append(_TensorBoard(run_dir, first_step))
    if config.use_wandb:
        sinks.append(_Wandb(config, run_dir, first_step, settings))
    return sinks


class _TensorBoard:
    def __init__(self, run_dir: str, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--use-tensorboard needs its package: pip install miles[tensorboard]"
            ) from error

        if not storage.is_local(run_dir):
            raise ConfigError(
                "--use-tensorboard writes into the run folder: give a local --output-dir, not "
                f"{run_dir}"
            )
        folder = storage.filesystem(storage.join(run_dir, run_folder.TENSORBOARD))[1]
        self._writer = SummaryWriter(folder, purge_step=first_step)

    def write(self, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(numbers["step"]))

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases. A training that resumes continues the same one."""

    def __init__(
        self, config: LoggingConfig, run_dir: str, first_step: int, settings: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--use-wandb needs its package: pip install miles[wandb]") from error

        mode = config.wandb_mode or os.environ.get("WANDB_MODE") or "online"
        folder = _wandb_folder(config, run_dir)
        if mode in ("offline", "dryrun") and folder is None:  # wandb has two names for it
            raise ConfigError(
                "--wandb-mode offline writes into the run folder: give a local --output-dir, not "
                f"{run_dir}, or a --wandb-dir"
            )

        run_id = _wandb_id(run_dir, config.wandb_run_id, is_new=first_step == 0)
        self._folder = None if folder else tempfile.TemporaryDirectory(prefix="miles-wandb-")
        try:
            account = _log_in(config) if mode == "online" else {}
            self._run = wandb.init(
                entity=config.wandb_team,
                project=config.wandb_project,
                group=config.wandb_group,
                id=run_id,
                name=run_dir.rstrip("/").rsplit("/", 1)[-1],
                resume="allow",
                dir=self._folder.name if self._folder else folder,
                mode=mode,  # type: ignore[arg-type]
                config=_redacted(settings),
                settings=wandb.Settings(
                    **account,
                    console="off",
                    silent=True,
                    disable_code=True,
                    disable_git=True,
                    save_code=False,
                    # wandb 0.31 keeps the command line in it, where a URL may have a password.
                    x_disable_meta=True,
                ),
            )
        except (wandb.Error, ValueError) as error:  # ValueError: a setting such as WANDB_MODE
            # pydantic quotes the value that it refuses, and a traceback would show it as the cause.
            text = _one_message(error)
            cause: Exception | None = error
            if config.wandb_key:
                text = text.replace(_KEY_VARIABLE, "--wandb-key")
                cause = None
            raise ConfigError(
                f"--use-wandb: {redact(text).rstrip('.')}. {_WITHOUT_LOGIN}"
            ) from cause
        # Without this, wandb counts by itself, and drops the steps that come again after a restart.
        self._run.define_metric("*", step_metric="step")

    def write(self, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if self._folder:
            self._folder.cleanup()


def _wandb_folder(config: LoggingConfig, run_dir: str) -> str | None:
    """Return the local folder for what is to be sent; None where there is none to keep it in.

    Raises:
        ConfigError: `--wandb-dir` cannot be made.
    """
    if config.wandb_dir:
        try:
            os.makedirs(config.wandb_dir, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--wandb-dir {config.wandb_dir}: no folder can be made there ({error.strerror}); "
                "give another one"
            ) from error
        return config.wandb_dir
    return storage.filesystem(run_dir)[1] if storage.is_local(run_dir) else None


def _wandb_id(run_dir: str, given: str | None, *, is_new: bool) -> str:
    """Return the id of a run, and keep it in the run folder; a new run gets a new one.

    Args:
        given: the id that the user chose, if any.
    """
    path = storage.join(run_dir, run_folder.WANDB_ID)
    if given:
        storage.write_text(path, given)
    elif is_new or not storage.exists(path):
        storage.write_text(path, secrets.token_hex(4))
    return storage.read_text(path).strip()


def _log_in(config: LoggingConfig) -> dict[str, str]:
    """Check that Weights & Biases accepts us; return wandb's settings of the server and the key.

    Raises:
        ConfigError: no key is given.
    """
    import wandb

    server = {"base_url": config.wandb_host} if config.wandb_host else {}
    wandb.setup(settings=wandb.Settings(silent=True, **server))

    with _key_in_environment(config.wandb_key):
        # `prompt` would ask on the terminal. `verify` finds out in 10 seconds that a key is wrong
        # or that no server answers; `init` takes 90.
        if not wandb.login(prompt=False, verify=True):
            raise ConfigError(
                f"--use-wandb needs a login: WANDB_API_KEY, or wandb login. {_WITHOUT_LOGIN}"
            )
    return {**server, "api_key": config.wandb_key.reveal()} if config.wandb_key else server


@contextlib.contextmanager
def _key_in_environment(key: Secret | None) -> Iterator[None]:
    """Give wandb a key by WANDB_API_KEY, for a moment.

    wandb 0.31 would write the `key` of `wandb.login` into .netrc, and would not verify one from
    `wandb.setup`.
    """
    if not key:
        yield
        return

    before = os.environ.get(_KEY_VARIABLE)
    os.environ[_KEY_VARIABLE] = key.reveal()
    try:
        yield
    finally:
        del os.environ[_KEY_VARIABLE]
        if before is not None:
            os.environ[_KEY_VARIABLE] = before


def _one_message(error: Exception) -> str:
    """Return an error's text; of pydantic's, only what is wrong, not the value."""
    import pydantic

    if isinstance(error, pydantic.ValidationError):
        parts = [f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()]
        return "; ".join(parts)
    return str(error)


def _redacted(value: Any) -> Any:
    """Return settings with the passwords in their URLs cut out, and secrets hidden."""
    if isinstance(value, Secret):
        return str(value)
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item) for item in value]
    return value
