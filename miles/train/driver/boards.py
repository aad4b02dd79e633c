"""TensorBoard and Weights & Biases, as their own processes have them (`sink_process`).

In: a request of `sinks`, then the finite numbers of each step. Out: event files; a run there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from miles.common.redact import redact
from miles.errors import ConfigError

_WITHOUT_LOGIN = "--wandb-mode offline needs neither login nor network; wandb sync sends it later"

_KEY_VARIABLE = "WANDB_API_KEY"


class Board(Protocol):
    """A sink as its own process has it. Its methods raise whatever its library raises."""

    def write(self, numbers: Mapping[str, float]) -> None:
        """Add the finite numbers of a step, `step` among them."""

    def flush(self) -> None:
        """Have what was added safe."""

    def close(self, *, failed: bool) -> None:
        """End the run there, and say whether it failed."""


def open_board(request: Mapping[str, Any]) -> Board:
    """Open a sink in this process.

    Args:
        request: of `BackgroundSink`.

    Raises:
        ConfigError: a login is missing, a setting is wrong, or a server does not answer.
    """
    if request["board"] == "wandb":
        return _Wandb(request)
    return _TensorBoard(request)


class _TensorBoard:
    """Writes event files by TensorBoard's own writer, which needs no torch."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(request["folder"])
        # Of the files before this one, TensorBoard hides this step and those that follow it.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=request["first_step"], session_log=start))

    def write(self, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for key, value in numbers.items():
            if key != "step":
                values.append(Summary.Value(tag=key, simple_value=value))
        step = int(numbers["step"])
        self._writer.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        )

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import wandb

        key = request["key"]
        try:
            account = _log_in(request["host"], key) if request["mode"] == "online" else {}
            self._run = wandb.init(
                entity=request["entity"],
                project=request["project"],
                group=request["group"],
                id=request["run_id"],
                name=request["name"],
                resume="allow",
                dir=request["folder"],
                mode=request["mode"],
                config=request["settings"],
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
            # pydantic quotes the value that it refuses.
            text = _one_message(error)
            if key:
                text = text.replace(_KEY_VARIABLE, "--wandb-key")
            raise ConfigError(
                f"--use-wandb: {redact(text).rstrip('.')}. {_WITHOUT_LOGIN}"
            ) from None
        # Without this, wandb counts by itself, and drops the steps that come again after a restart.
        self._run.define_metric("*", step_metric="step")

    def write(self, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers))

    def flush(self) -> None:
        """Do nothing: wandb writes when it has enough."""

    def close(self, *, failed: bool) -> None:
        import wandb

        self._run.finish(exit_code=int(failed))
        wandb.teardown()


def _log_in(host: str | None, key: str | None) -> dict[str, str]:
    """Check that Weights & Biases accepts us; return wandb's settings of the server and the key.

    Raises:
        ConfigError: no key is given.
    """
    import wandb

    server = {"base_url": host} if host else {}
    wandb.setup(settings=wandb.Settings(silent=True, **server))

    with _key_in_environment(key):
        # `prompt` would ask on the terminal. `verify` finds out in 10 seconds that a key is wrong
        # or that no server answers; `init` takes 90.
        if not wandb.login(prompt=False, verify=True):
            raise ConfigError(
                f"--use-wandb needs a login: WANDB_API_KEY, or wandb login. {_WITHOUT_LOGIN}"
            )
    return {**server, "api_key": key} if key else server


@contextlib.contextmanager
def _key_in_environment(key: str | None) -> Iterator[None]:
    """Give wandb a key by WANDB_API_KEY, for a moment.

    wandb 0.31 would write the `key` of `wandb.login` into .netrc, and would not verify one from
    `wandb.setup`.
    """
    if not key:
        yield
        return

    before = os.environ.get(_KEY_VARIABLE)
    os.environ[_KEY_VARIABLE] = key
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
