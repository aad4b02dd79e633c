"""The trainers: Megatron ranks fed by the data stream. README.md walks through a step.

In: a `TrainConfig`, and the rows of `miles.data`. Out: checkpoints and the files of the run folder.
`driver` runs in the process of `miles train`, `rank` and `model` in one process for each rank.
It may import the settings, the records and the stream of `miles.data`, and `architecture`,
`convert` (driver, ranks, dry run) and `common`. `driver`, `launch` and `config` load no torch and
no Megatron when they are imported.

`miles.train.run` is a function, and `miles.train.TrainConfig` its settings. They are imported, with
what they need, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.train.config import TrainConfig
    from miles.train.notebook.training import run

__all__ = ["TrainConfig", "run"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used."""
    from miles.common.ctrl_c import on_ctrl_c

    with on_ctrl_c("stopped; nothing was begun"):
        if name == "run":
            from miles.train.notebook.training import run

            return run
        if name == "TrainConfig":
            from miles.train.config import TrainConfig

            return TrainConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what tab completion shows: what is public, without the rooms behind it."""
    return __all__
