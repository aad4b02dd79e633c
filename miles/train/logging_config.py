"""The settings of the metrics' sinks: TensorBoard and Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from miles.common.flags import Flag, check_settings


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

    def __post_init__(self) -> None:
        check_settings(self)
