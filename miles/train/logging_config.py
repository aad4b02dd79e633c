"""The settings of the metrics' sinks: TensorBoard and Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from miles.common.flags import Flag, check_settings
from miles.common.redact import require_no_secret
from miles.common.secret import Secret
from miles.errors import ConfigError


@dataclass(frozen=True)
class LoggingConfig:
    """Logging, beside metrics.jsonl, which is always written."""

    use_tensorboard: Annotated[
        bool, Flag("--use-tensorboard", help="also to tensorboard/ in the run's folder")
    ] = False
    use_wandb: Annotated[bool, Flag("--use-wandb", help="also to Weights & Biases")] = False
    wandb_project: Annotated[str, Flag("--wandb-project", "NAME", "project of the run there")] = (
        "miles"
    )
    wandb_group: Annotated[
        str | None, Flag("--wandb-group", "NAME", "group of the run there", default="none")
    ] = None
    wandb_mode: Annotated[
        str | None,
        Flag(
            "--wandb-mode",
            "MODE",
            "whether the run is sent at once, kept in a folder, or neither",
            choices=("online", "offline", "disabled"),
            default="as the environment says",
        ),
    ] = None

    wandb_key: Annotated[
        Secret | None,
        Flag(
            "--wandb-key",
            "KEY",
            "API key there; it is neither shown nor stored. In WANDB_API_KEY it is safer: other "
            "users of a machine may see its command lines",
            default="the environment's, or that of wandb login",
        ),
    ] = None
    wandb_host: Annotated[
        str | None,
        Flag(
            "--wandb-host",
            "URL",
            "a server of your own",
            default="WANDB_BASE_URL, or https://api.wandb.ai",
        ),
    ] = None
    wandb_team: Annotated[
        str | None,
        Flag("--wandb-team", "NAME", "team that the project belongs to", default="your own"),
    ] = None
    wandb_dir: Annotated[
        str | None,
        Flag(
            "--wandb-dir",
            "DIR",
            "local folder for what is to be sent; with --wandb-mode offline, it stays there",
            default="the run's folder where that is local",
        ),
    ] = None
    wandb_run_id: Annotated[
        str | None,
        Flag(
            "--wandb-run-id",
            "ID",
            "the run there that is continued, or begun under this id",
            default="the id kept in the run's folder; a run from step 0 gets a new one",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.wandb_host:
            require_no_secret(self.wandb_host)
        if self.wandb_dir and "://" in self.wandb_dir:
            raise ConfigError(f"--wandb-dir {self.wandb_dir}: give a local folder, not a URL")
