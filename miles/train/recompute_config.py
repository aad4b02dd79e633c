"""Activations that are computed twice, so that they need not be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from miles.common.flags import Flag, check_settings
from miles.errors import ConfigError


@dataclass(frozen=True)
class RecomputeConfig:
    """Recomputation: activations that the backward pass computes again instead of keeping them."""

    granularity: Annotated[
        str | None,
        Flag(
            "--recompute-granularity",
            "WHAT",
            "full: whole layers again; selective: the inner part of attention again",
            choices=("full", "selective"),
            default="all are kept",
        ),
    ] = None
    method: Annotated[
        str | None,
        Flag(
            "--recompute-method",
            "HOW",
            "of full: uniform, every N layers are a piece whose input is kept; block, the first N "
            "layers of a pipeline stage are computed again and the others kept",
            choices=("uniform", "block"),
        ),
    ] = None
    num_layers: Annotated[
        int | None,
        Flag("--recompute-num-layers", "N", "the N of --recompute-method"),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.granularity == "full":
            if self.method is None or self.num_layers is None or self.num_layers < 1:
                raise ConfigError(
                    "--recompute-granularity full needs --recompute-method uniform or block and "
                    f"--recompute-num-layers of at least 1, not {self.method!r} and "
                    f"{self.num_layers}"
                )
        elif self.method is not None or self.num_layers is not None:
            raise ConfigError(
                "--recompute-method and --recompute-num-layers go with --recompute-granularity full"
            )


KEEP_ALL = RecomputeConfig()
"""No activation is computed twice."""
