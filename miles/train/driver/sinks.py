"""The sinks of metrics beside metrics.jsonl: TensorBoard and Weights & Biases.

`open_sinks` is called by the driver. It starts a process for each sink (`sink_process`), in which
`boards.open_board` opens it: the driver imports neither library.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from typing import Any

from miles.common import own_files, run_folder, storage
from miles.common.redact import redact
from miles.common.secret import Secret
from miles.errors import ConfigError, WriteError
from miles.train.driver.metrics_log import Sink
from miles.train.driver.sink_process import BackgroundSink, SinkRequest
from miles.train.estimate.place_checks import require_sinks, wandb_mode
from miles.train.logging_config import LoggingConfig


def open_sinks(
    config: LoggingConfig,
    run_dir: str,
    first_step: int,
    settings: Mapping[str, Any],
    *,
    must_open: bool = True,
) -> list[Sink]:
    """Open the sinks that are asked for, each in a process of its own.

    Args:
        run_dir: the run folder.
        first_step: of this attempt. Points of this step and later ones, of an earlier attempt, are
            hidden.
        settings: of the run, to be shown there; passwords in URLs are cut out.
        must_open: False: a sink that does not answer is tried again later.

    Raises:
        ConfigError: a package, a login or a local folder is missing, or a sink does not answer.
    """
    require_sinks(config, run_dir)
    sinks: list[Sink] = []
    if config.use_tensorboard:
        sinks.append(_open_tensorboard(run_dir, first_step, must_open))
    if config.use_wandb:
        sinks.append(_open_wandb(config, run_dir, first_step, settings, must_open))
    return sinks


def _open_tensorboard(run_dir: str, first_step: int, must_open: bool) -> Sink:
    folder = storage.filesystem(storage.join(run_dir, run_folder.TENSORBOARD))[1]
    request = SinkRequest("TensorBoard", {"board": "tensorboard", "folder": folder})
    return BackgroundSink(request, first_step, must_open=must_open)


def _open_wandb(
    config: LoggingConfig,
    run_dir: str,
    first_step: int,
    settings: Mapping[str, Any],
    must_open: bool,
) -> Sink:
    """Open a run of Weights & Biases; a training that resumes continues the same one."""
    folder = _wandb_folder(config, run_dir)
    with storage.writing("a temporary folder ($TMPDIR, or /tmp)"):
        kept_in = folder or tempfile.mkdtemp(prefix="miles-wandb-")
    content = {
        "board": "wandb",
        "mode": wandb_mode(config),
        "folder": kept_in,
        "run_id": _wandb_id(
            run_dir, config.wandb_run_id, is_new=first_step == 0, must_write=must_open
        ),
        "name": run_dir.rstrip("/").rsplit("/", 1)[-1],
        "entity": config.wandb_team,
        "project": config.wandb_project,
        "group": config.wandb_group,
        "host": config.wandb_host,
        "key": config.wandb_key.reveal() if config.wandb_key else None,
        "settings": _redacted(settings),
    }
    request = SinkRequest("Weights & Biases", content, kept_in, is_temporary=folder is None)
    return BackgroundSink(request, first_step, must_open=must_open)


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


def _wandb_id(run_dir: str, given: str | None, *, is_new: bool, must_write: bool) -> str:
    """Return the id of a run, and keep it in the run folder; a new run gets a new one.

    Args:
        given: the id that the user chose, if any.
        must_write: False: where it cannot be kept, the run goes on under it.

    Raises:
        WriteError: it cannot be kept.
    """
    path = storage.join(run_dir, run_folder.WANDB_ID)
    if not given and not is_new and storage.exists(path):
        return storage.read_text(path).strip()

    run_id = (given or secrets.token_hex(4)).strip()
    try:
        own_files.write_if_new(path, run_id)
    except WriteError:
        if must_write:
            raise
    return run_id


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
