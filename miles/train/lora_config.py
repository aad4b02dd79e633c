"""LoRA: small matrices beside the frozen weights, which alone are trained. Names are Miles's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from miles.architecture.adapter import ALL_LINEAR, AdapterShape, resolve_targets
from miles.architecture.config import ModelShape
from miles.common.flags import Flag, check_settings
from miles.common.mistakes import Mistakes
from miles.errors import ConfigError

_ALPHA = 16.0


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: which projections have an adapter, and of what rank."""

    rank: Annotated[
        int,
        Flag(
            "--lora-rank",
            "RANK",
            "train adapters of this rank beside the frozen weights; 0: all weights are trained",
            minimum=0,
        ),
    ] = 0
    alpha: Annotated[
        float,
        Flag("--lora-alpha", "ALPHA", "adapters are scaled by alpha / rank", above=0),
    ] = _ALPHA
    dropout: Annotated[
        float,
        Flag(
            "--lora-dropout",
            "SHARE",
            "values of an adapter's input that are dropped in training; which ones depends on the "
            "token, not on the ranks",
            minimum=0,
            below=1,
        ),
    ] = 0.0
    target_modules: Annotated[
        tuple[str, ...],
        Flag(
            "--target-modules",
            "NAMES",
            "projections with an adapter, with commas or spaces between: Hugging Face's names "
            "(q_proj), Megatron's (linear_qkv: its three), or all-linear",
        ),
    ] = (ALL_LINEAR,)
    exclude_modules: Annotated[
        tuple[str, ...],
        Flag("--exclude-modules", "NAMES", "projections of them to leave out"),
    ] = ()
    adapter_path: Annotated[
        str | None,
        Flag(
            "--lora-adapter-path",
            "DIR",
            "an adapter in PEFT's format to begin from",
            default="A is random, and B is 0",
        ),
    ] = None
    is_rank_stabilized: Annotated[
        bool,
        Flag("--use-rslora", help="scale adapters by alpha / √rank, as in rsLoRA"),
    ] = False

    def __post_init__(self) -> None:
        check_settings(self)
        if self.rank:
            return
        mistakes = Mistakes()
        for flag, is_given in (
            ("--lora-alpha", self.alpha != _ALPHA),
            ("--target-modules", self.target_modules != (ALL_LINEAR,)),
            ("--exclude-modules", self.exclude_modules),
            ("--lora-dropout", self.dropout),
            ("--lora-adapter-path", self.adapter_path),
            ("--use-rslora", self.is_rank_stabilized),
        ):
            mistakes.require(not is_given, f"{flag} belongs to LoRA: give --lora-rank beside it")
        mistakes.raise_all()

    @property
    def is_on(self) -> bool:
        """Return whether adapters are trained, and not the weights."""
        return self.rank > 0

    def adapter(self, shape: ModelShape) -> AdapterShape | None:
        """Return the adapter of a model; None: all weights are trained.

        Raises:
            ConfigError: a target that the model does not have; a rank above its hidden size.
        """
        if not self.is_on:
            return None
        if self.rank > shape.hidden_size:
            raise ConfigError(
                f"--lora-rank {self.rank} is more than the model's hidden size, "
                f"{shape.hidden_size}: such an adapter is larger than the weights beside it"
            )
        targets = resolve_targets(shape, _names(self.target_modules), _names(self.exclude_modules))
        return AdapterShape(self.rank, self.alpha, targets, self.is_rank_stabilized)


def _names(words: tuple[str, ...]) -> list[str]:
    """Return the names in words that may have commas between them."""
    names = []
    for word in words:
        names += [name.strip() for name in word.split(",") if name.strip()]
    return names


FULL = LoraConfig()
"""All weights are trained."""
