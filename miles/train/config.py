"""The settings of a training run: frozen, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from miles.data.config import DataConfig, SourceConfig
from miles.errors import ConfigError
from miles.train.parallel_layout import Layout


def _require_positive(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{flag} must be positive, not {value}")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run."""

    num_nodes: int = 1
    """`--actor-num-nodes`"""
    gpus_per_node: int = 1
    """`--actor-num-gpus-per-node`: ranks a node; on a machine without CUDA, CPU processes"""
    num_gpus_per_node: int = 8
    """`--num-gpus-per-node`: how many a machine has; more ranks a node than that are refused"""
    tensor: int = 1
    """`--tensor-model-parallel-size`"""
    pipeline: int = 1
    """`--pipeline-model-parallel-size`"""
    expert: int = 1
    """`--expert-model-parallel-size`: over how many ranks a layer's experts are spread"""
    expert_tensor: int | None = None
    """`--expert-tensor-parallel-size`; None: as `tensor`"""
    sequence_parallel: bool = False
    """`--sequence-parallel`: norms on a part of the tokens of each tensor rank"""
    ray_address: str | None = None
    """None: a small Ray of the run's own, on localhost"""
    timeout_minutes: float = 10.0
    """`--distributed-timeout-minutes`: how long a collective, a step or a start may take"""
    object_store_bytes: int = 512 << 20
    """of the run's own Ray"""

    def __post_init__(self) -> None:
        if self.gpus_per_node > self.num_gpus_per_node:
            raise ConfigError(
                f"--actor-num-gpus-per-node {self.gpus_per_node} is more than a machine has: --num-gpus-per-node "
                f"{self.num_gpus_per_node}"
            )

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def layout(self) -> Layout:
        """Where each rank stands.

        Raises:
            ConfigError: the ranks cannot be divided so.
        """
        return Layout(
            self.world_size,
            self.tensor,
            self.pipeline,
            self.sequence_parallel,
            self.expert,
            self.tensor if self.expert_tensor is None else self.expert_tensor,
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """Names and meanings as in Megatron's flags."""

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"
    """constant, linear, cosine or inverse-square-root"""
    lr_warmup_iters: int = 0
    """steps over which the rate rises from 0 to `lr`"""
    lr_warmup_fraction: float | None = None
    """`--lr-warmup-fraction`: the same as a share of the run's steps; in place of `lr_warmup_iters`"""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """global norm above which gradients are scaled down; 0: never"""

    def __post_init__(self) -> None:
        styles = ("constant", "linear", "cosine", "inverse-square-root")
        if self.lr_decay_style not in styles:
            raise ConfigError(
                f"--lr-decay-style must be one of {', '.join(styles)}, not {self.lr_decay_style!r}"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        if self.lr_warmup_iters < 0:
            raise ConfigError("--lr-warmup-iters must not be negative")
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_iters:
                raise ConfigError(
                    "--lr-warmup-iters and --lr-warmup-fraction say the same; give one of them"
                )
            if not 0 <= self.lr_warmup_fraction < 1:
                raise ConfigError(
                    f"--lr-warmup-fraction must be in [0, 1), not {self.lr_warmup_fraction}"
                )

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up in a run of so many."""
        if self.lr_warmup_fraction is not None:
            return int(self.lr_warmup_fraction * num_steps)
        return self.lr_warmup_iters


def check_schedule(settings: OptimizerSettings, num_steps: int) -> None:
    """Raises:
    ConfigError: the warm-up is not shorter than the run.
    """
    if settings.warmup_steps(num_steps) >= num_steps:
        raise ConfigError(
            f"--lr-warmup-iters {settings.lr_warmup_iters} is not shorter than the run, which has {num_steps} steps"
        )


@dataclass(frozen=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of kept; names as in Megatron's flags."""

    granularity: str | None = None
    """None: all are kept; "selective": attention's inner part again; "full": whole layers again"""
    method: str | None = None
    """of "full": "uniform", every `num_layers` layers make a piece of which the input is kept; "block", the first
    `num_layers` layers of a pipeline stage are computed again, the others kept"""
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.granularity not in (None, "full", "selective"):
            raise ConfigError(
                f"--recompute-granularity must be full or selective, not {self.granularity!r}"
            )
        if self.granularity == "full":
            if (
                self.method not in ("uniform", "block")
                or self.num_layers is None
                or self.num_layers < 1
            ):
                raise ConfigError(
                    "--recompute-granularity full needs --recompute-method uniform or block and --recompute-num-layers "
                    f"of at least 1, not {self.method!r} and {self.num_layers}"
                )
        elif self.method is not None or self.num_layers is not None:
            raise ConfigError(
                "--recompute-method and --recompute-num-layers go with --recompute-granularity full"
            )


KEEP_ALL = RecomputeConfig()
"""No activation is computed twice."""


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and how often. That rows are held out of training is `DataConfig.held_out_fraction`."""

    sources: tuple[SourceConfig, ...] = ()
    """`--eval-prompt-data`; empty: the held-out training rows (`--eval-fraction`), or nothing"""
    interval: int | None = None
    """`--eval-interval`: steps between evaluations; None: after the last step only"""
    num_samples: int = 0
    """`--eval-samples`: greedy answers that each evaluation writes into the run's folder"""
    max_response_tokens: int = 256
    """`--eval-max-response-len`: where an answer is cut"""

    def __post_init__(self) -> None:
        _require_positive("--eval-interval", self.interval)
        _require_positive("--eval-max-response-len", self.max_response_tokens)
        if self.num_samples < 0:
            raise ConfigError(f"--eval-samples must not be negative, not {self.num_samples}")


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go beside metrics.jsonl."""

    use_tensorboard: bool = False
    use_wandb: bool = False
    wandb_project: str = "miles"
    wandb_group: str | None = None
    wandb_mode: str | None = None
    """`--wandb-mode`: online, offline or disabled; None: as the environment says"""

    def __post_init__(self) -> None:
        if self.wandb_mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(
                f"--wandb-mode must be online, offline or disabled, not {self.wandb_mode!r}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A run, complete."""

    hf_checkpoint: str
    """folder with config.json and the tokenizer (`--hf-checkpoint`)"""
    ref_load: str
    """`torch_dist` folder of the weights to start from (`--ref-load`)"""
    save: str
    """where checkpoints go (`--save`); a checkpoint found there is gone on from"""
    data: DataConfig
    load: str | None = None
    """`--load`: a run's checkpoints to go on from; None: `save`"""
    save_interval: int = 0
    """steps between checkpoints; 0: only at the end"""
    output_dir: str = ""
    """the run's folder: metrics.jsonl, config, first batch, rejects; default `save`"""
    save_hf: str | None = None
    """`--save-hf`: folder for the trained weights in Hugging Face's format, written after the last step; with
    `{rollout_id}` in it, after every checkpoint, with the step in its place"""
    keep_last: int | None = None
    """`--keep-last`: newest checkpoints that are kept; None: all, unless `keep_best` is set"""
    keep_best: int | None = None
    """`--keep-best`: checkpoints with the lowest evaluation loss that are kept beside them"""
    max_skipped_steps: int = 10
    """`--max-skipped-steps`: more steps in a row than this whose loss or gradient is not finite end the run"""
    max_restarts: int = 3
    """`--max-restarts`: a run that lost a part of itself starts again, so often from one checkpoint"""
    on_save_error: str = "end"
    """`--on-save-error`: a checkpoint that cannot be written ends the run ("end"), or is left out ("continue"); that of
    the last step ends it always"""
    num_rollout: int | None = None
    """a limit in steps; None: as many as `num_epoch` has"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: int = 1234
    bf16: bool = False
    deterministic: bool = False
    """`--deterministic-mode`: kernels that give the same bits each time, or an error where there are none"""
    recompute: RecomputeConfig = KEEP_ALL
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    dry_run: bool = False
    """`--dry-run`: resolve, certify, count and estimate; train nothing"""

    def __post_init__(self) -> None:
        if self.save_interval < 0:
            raise ConfigError(f"--save-interval must not be negative, got {self.save_interval}")
        for flag, value in (
            ("--num-rollout", self.num_rollout),
            ("--keep-last", self.keep_last),
            ("--keep-best", self.keep_best),
        ):
            _require_positive(flag, value)
        if self.max_skipped_steps < 0:
            raise ConfigError(
                f"--max-skipped-steps must not be negative, not {self.max_skipped_steps}"
            )
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts must not be negative, not {self.max_restarts}")
        if self.on_save_error not in ("end", "continue"):
            raise ConfigError(
                f"--on-save-error must be end or continue, not {self.on_save_error!r}"
            )
        if self.evaluation.sources and self.data.held_out_fraction:
            raise ConfigError(
                "--eval-prompt-data and --eval-fraction: give one of them, rows of their own or held-out ones"
            )
        if not self.evaluation.sources and not self.data.held_out_fraction:
            for flag, given in (
                ("--eval-interval", self.evaluation.interval),
                ("--eval-samples", self.evaluation.num_samples),
                ("--keep-best", self.keep_best),
            ):
                if given:
                    raise ConfigError(
                        f"{flag} needs rows to evaluate on: --eval-prompt-data or --eval-fraction"
                    )
        if self.data.pack.dp_size != self.cluster.layout.data:
            raise ConfigError(
                f"the data is packed for {self.data.pack.dp_size} data-parallel ranks, but the layout has "
                f"{self.cluster.layout.data}: PackConfig.dp_size must be ClusterConfig.layout.data"
            )

    @property
    def run_dir(self) -> str:
        return self.output_dir or self.save
