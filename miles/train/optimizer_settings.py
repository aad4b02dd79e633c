"""The settings of the optimizer and its learning rate. The names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from miles.common.flags import Flag, check_settings
from miles.common.mistakes import Mistakes
from miles.errors import ConfigError

if TYPE_CHECKING:
    from miles.architecture.config import ModelShape  # it opens files: fsspec


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, Adam. Names and meanings as in Megatron's flags, where nothing else is said."""

    lr: Annotated[float, Flag("--lr", "RATE", "highest learning rate", minimum=0)] = 1e-5
    min_lr: Annotated[
        float, Flag("--min-lr", "RATE", "learning rate at the end of the decay", minimum=0)
    ] = 0.0
    lr_decay_style: Annotated[
        str,
        Flag(
            "--lr-decay-style",
            "STYLE",
            "how the rate falls from --lr to --min-lr",
            choices=("constant", "linear", "cosine", "inverse-square-root"),
        ),
    ] = "cosine"
    lr_warmup_iters: Annotated[
        int,
        Flag(
            "--lr-warmup-iters",
            "STEPS",
            "steps over which the rate rises from 0",
            minimum=0,
            choice="warm-up",
        ),
    ] = 0
    lr_warmup_fraction: Annotated[
        float | None,
        Flag(
            "--lr-warmup-fraction",
            "SHARE",
            "the same, as a share of the run's steps",
            choice="warm-up",
        ),
    ] = None
    weight_decay: Annotated[
        float,
        Flag(
            "--weight-decay",
            "X",
            "weight decay of matrices; norms and biases have none",
            minimum=0,
        ),
    ] = 0.1
    adam_beta1: Annotated[
        float, Flag("--adam-beta1", "X", "decay of the first moment", minimum=0, below=1)
    ] = 0.9
    adam_beta2: Annotated[
        float, Flag("--adam-beta2", "X", "decay of the second moment", minimum=0, below=1)
    ] = 0.95
    adam_eps: Annotated[
        float, Flag("--adam-eps", "X", "added to the root of the second moment", minimum=0)
    ] = 1e-8
    clip_grad: Annotated[
        float,
        Flag(
            "--clip-grad",
            "X",
            "global norm above which the gradient is scaled down; 0: it never is",
            minimum=0,
        ),
    ] = 1.0
    moe_aux_loss_coeff: Annotated[
        float,
        Flag(
            "--moe-aux-loss-coeff",
            "X",
            "weight of the loss that balances the experts: Hugging Face's formula over the tokens "
            "of a step and all layers, not Megatron's (docs/metrics.md); 0: none",
            minimum=0,
        ),
    ] = 0.0
    precision_aware: Annotated[
        bool,
        Flag(
            "--use-precision-aware-optimizer",
            help="the optimizer itself keeps the float32 weights. On a GPU it needs Transformer "
            "Engine, or --optimizer-cpu-offload",
        ),
    ] = False
    main_params_dtype: Annotated[
        str,
        Flag(
            "--main-params-dtype",
            "DTYPE",
            "precision of those weights; other than fp32 with --use-precision-aware-optimizer only",
            choices=("fp32", "fp16"),
        ),
    ] = "fp32"
    exp_avg_dtype: Annotated[
        str,
        Flag(
            "--exp-avg-dtype",
            "DTYPE",
            "precision in which the first moment is kept, likewise",
            choices=("fp32", "fp16", "bf16"),
        ),
    ] = "fp32"
    exp_avg_sq_dtype: Annotated[
        str,
        Flag(
            "--exp-avg-sq-dtype",
            "DTYPE",
            "precision in which the second moment is kept, likewise",
            choices=("fp32", "fp16", "bf16"),
        ),
    ] = "fp32"
    cpu_offload: Annotated[
        bool,
        Flag(
            "--optimizer-cpu-offload",
            help="float32 weights and moments in the memory of the machine, and Adam's step on its "
            "processors; with --use-precision-aware-optimizer, and not in float32",
        ),
    ] = False
    offload_fraction: Annotated[
        float,
        Flag(
            "--optimizer-offload-fraction",
            "SHARE",
            "share of the parameters that --optimizer-cpu-offload is for",
        ),
    ] = 1.0
    overlap_offload: Annotated[
        bool,
        Flag(
            "--overlap-cpu-optimizer-d2h-h2d",
            help="copy gradients and weights of one parameter while Adam steps on another, with "
            "--optimizer-cpu-offload",
        ),
    ] = False

    def __post_init__(self) -> None:
        check_settings(self)
        mistakes = Mistakes()
        self._check_rates(mistakes)
        self._check_offload(mistakes)
        mistakes.raise_all()

    def _check_offload(self, mistakes: Mistakes) -> None:
        """Check the flags of the optimizer's memory against one another, as Megatron-LM does."""
        mistakes.require(
            not self.cpu_offload or self.precision_aware,
            "--optimizer-cpu-offload needs --use-precision-aware-optimizer beside it: Megatron "
            "keeps the offloaded float32 weights there",
        )
        for flag, is_given in (
            ("--overlap-cpu-optimizer-d2h-h2d", self.overlap_offload),
            ("--optimizer-offload-fraction", self.offload_fraction != 1.0),
        ):
            mistakes.require(
                self.cpu_offload or not is_given, f"{flag} goes with --optimizer-cpu-offload"
            )
        mistakes.require(
            0 < self.offload_fraction <= 1,
            f"--optimizer-offload-fraction must be in (0, 1], not {self.offload_fraction}",
        )

        for flag, dtype in (
            ("--main-params-dtype", self.main_params_dtype),
            ("--exp-avg-dtype", self.exp_avg_dtype),
            ("--exp-avg-sq-dtype", self.exp_avg_sq_dtype),
        ):
            mistakes.require(
                dtype == "fp32" or self.precision_aware,
                f"{flag} {dtype} goes with --use-precision-aware-optimizer",
            )
            mistakes.require(
                dtype == "fp32" or not self.cpu_offload,
                f"{flag} {dtype}: what --optimizer-cpu-offload keeps in the machine's memory is "
                "float32; leave one of them out",
            )

    def require_fits(self, shape: ModelShape) -> None:
        """Check the settings against the model.

        Raises:
            ConfigError: experts are to be balanced where there are none.
        """
        if self.moe_aux_loss_coeff and shape.num_experts is None:
            raise ConfigError(
                f"--moe-aux-loss-coeff {self.moe_aux_loss_coeff}: {shape.model_type} has no "
                "experts to balance: leave it out"
            )

    def require_cpu(self) -> None:
        """Check that the optimizer runs without a GPU.

        Raises:
            ConfigError: it does not.
        """
        if self.precision_aware and not self.cpu_offload:
            raise ConfigError(
                "--use-precision-aware-optimizer needs the FusedAdam of Transformer Engine, which "
                "is for GPUs only; leave it out, or give --optimizer-cpu-offload beside it"
            )

    def _check_rates(self, mistakes: Mistakes) -> None:
        """Check the learning rate's schedule."""
        mistakes.require(
            0 <= self.min_lr <= self.lr,
            f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}",
        )
        if self.lr_warmup_fraction is not None:
            mistakes.require(
                not self.lr_warmup_iters,
                "--lr-warmup-iters and --lr-warmup-fraction say the same; give one of them",
            )
            mistakes.require(
                0 <= self.lr_warmup_fraction < 1,
                f"--lr-warmup-fraction must be in [0, 1), not {self.lr_warmup_fraction}",
            )

    def warmup_steps(self, num_steps: int) -> int:
        """Return the number of steps of the warm-up in a run of `num_steps`."""
        if self.lr_warmup_fraction is not None:
            return int(self.lr_warmup_fraction * num_steps)
        return self.lr_warmup_iters


def check_schedule(settings: OptimizerSettings, num_steps: int) -> None:
    """Check the learning rate's schedule against the length of the run.

    Raises:
        ConfigError: the warm-up is not shorter than the run.
    """
    if settings.warmup_steps(num_steps) >= num_steps:
        raise ConfigError(
            f"--lr-warmup-iters {settings.lr_warmup_iters} is not shorter than the run, which has "
            f"{num_steps} steps; lower it, or train for more steps"
        )
