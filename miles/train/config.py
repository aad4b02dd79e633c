"""The settings of a training run: frozen, checked before anything starts.

A setting is declared here with its flag (`miles.common.flags`), and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Self

from miles.common.flags import Flag, check_settings
from miles.common.mistakes import Mistakes
from miles.data.config import DataConfig, SourceConfig
from miles.errors import ConfigError
from miles.train.cluster_config import ClusterConfig as ClusterConfig
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.export_target import require_export
from miles.train.logging_config import LoggingConfig
from miles.train.lora_config import FULL, LoraConfig
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation. Holding rows out of training for it is `DataConfig.held_out_fraction`."""

    sources: Annotated[
        tuple[SourceConfig, ...],
        Flag(
            "--eval-prompt-data",
            "PATH",
            "rows to evaluate on; written as --prompt-data",
            default="the held-out rows of --eval-fraction, or none",
            choice="evaluation rows",
            written_as=tuple[str, ...],
        ),
    ] = ()
    interval: Annotated[
        int | None,
        Flag(
            "--eval-interval",
            "STEPS",
            "steps between evaluations",
            minimum=1,
            default="after the last step only",
        ),
    ] = None
    num_samples: Annotated[
        int,
        Flag(
            "--eval-samples",
            "N",
            "greedy answers that each evaluation writes to eval_samples.jsonl",
            minimum=0,
        ),
    ] = 0
    max_response_tokens: Annotated[
        int,
        Flag("--eval-max-response-len", "TOKENS", "where such an answer is cut", minimum=1),
    ] = 256

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class TrainConfig:
    """The run: its model, its checkpoints and its folder."""

    hf_checkpoint: Annotated[
        str,
        Flag(
            "--hf-checkpoint",
            "DIR",
            "folder (fsspec URL) with config.json, the tokenizer and, without --ref-load, the "
            "weights",
        ),
    ]
    ref_load: Annotated[
        str | None,
        Flag(
            "--ref-load",
            "DIR",
            "folder with the weights to start from: a Hugging Face one, or a torch_dist checkpoint",
            default="a converted checkpoint in --load or --save, or else --hf-checkpoint",
        ),
    ]
    save: Annotated[
        str,
        Flag("--save", "DIR", "where checkpoints go; the run resumes from one that is there"),
    ]
    data: DataConfig
    load: Annotated[
        str | None,
        Flag("--load", "DIR", "checkpoints of a run to resume from", default="--save"),
    ] = None
    save_interval: Annotated[
        int,
        Flag(
            "--save-interval",
            "STEPS",
            "steps between checkpoints, counted over all epochs (Miles also saves where an epoch "
            "ends: the dry run says how many steps one has); 0: only after the last step",
            minimum=0,
        ),
    ] = 0
    output_dir: Annotated[
        str,
        Flag(
            "--output-dir",
            "DIR",
            "the run's folder: metrics, config, first batch, rejects",
            default="--save",
        ),
    ] = ""
    save_hf: Annotated[
        str | None,
        Flag(
            "--save-hf",
            "DIR",
            "folder for the trained weights in Hugging Face's format, written after the last step; "
            "with {rollout_id} in it, after each checkpoint, with the step in its place",
        ),
    ] = None
    keep_last: Annotated[
        int | None,
        Flag(
            "--keep-last",
            "N",
            "newest checkpoints that are kept",
            minimum=1,
            default="all, unless --keep-best is given",
        ),
    ] = None
    keep_best: Annotated[
        int | None,
        Flag(
            "--keep-best",
            "N",
            "checkpoints with the lowest evaluation loss that are kept beside them",
            minimum=1,
        ),
    ] = None
    max_skipped_steps: Annotated[
        int,
        Flag(
            "--max-skipped-steps",
            "STEPS",
            "more steps in a row than this whose loss or gradient is not finite end the run",
            minimum=0,
        ),
    ] = 10
    max_restarts: Annotated[
        int,
        Flag(
            "--max-restarts",
            "N",
            "times that a run which lost a process starts again from the same checkpoint",
            minimum=0,
        ),
    ] = 3
    on_save_error: Annotated[
        str,
        Flag(
            "--on-save-error",
            "POLICY",
            "a checkpoint that cannot be written: end the run, or continue without it; that of the "
            "last step always ends it",
            choices=("end", "continue"),
        ),
    ] = "end"
    num_rollout: Annotated[
        int | None,
        Flag(
            "--num-rollout",
            "STEPS",
            "steps of the run, over as many epochs as they take; beside --num-epoch, the smaller "
            "one counts",
            minimum=1,
            default="all steps of --num-epoch",
        ),
    ] = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: Annotated[int, Flag("--seed", "SEED", "seed of the ranks' random states")] = 1234
    bf16: Annotated[
        bool | None,
        Flag(
            "--bf16",
            help="compute in bfloat16",
            default="on GPUs; a CPU computes in float32",
            choice="precision",
            also=(Flag("--no-bf16", help="compute in float32, on GPUs too", negates=True),),
        ),
    ] = None
    fp16: Annotated[
        bool,
        Flag(
            "--fp16",
            help="compute in float16, with a loss scale that follows the gradient; not with "
            "--expert-model-parallel-size",
            choice="precision",
        ),
    ] = False
    deterministic: Annotated[
        bool,
        Flag(
            "--deterministic-mode",
            help="kernels that give the same bits each time, or an error where there are none; on "
            "a CPU they always do",
        ),
    ] = False
    recompute: RecomputeConfig = KEEP_ALL
    lora: LoraConfig = FULL
    compute: ComputeConfig = AS_USUAL
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    dry_run: Annotated[
        bool,
        Flag(
            "--dry-run",
            help="resolve, certify, count rows and tokens, estimate memory; train nothing",
        ),
    ] = False

    def __post_init__(self) -> None:
        check_settings(self)
        mistakes = Mistakes()
        mistakes.of(self._check_precision)
        folders = {"--save": self.save, "--output-dir": self.output_dir}
        mistakes.of(partial(require_export, self.save_hf, folders))
        mistakes.of(self._check_evaluation)
        mistakes.raise_all()
        if self.data.pack.dp_size != self.cluster.layout.data:
            raise ConfigError(
                f"the data is packed for {self.data.pack.dp_size} data-parallel ranks, but the "
                f"layout has {self.cluster.layout.data}: PackConfig.dp_size must be "
                "ClusterConfig.layout.data"
            )

    def _check_precision(self) -> None:
        """Check that one precision is chosen, and that the layout can be trained in it."""
        mistakes = Mistakes()
        mistakes.require(
            not self.fp16 or self.bf16 is None,
            f"--fp16 and --{'' if self.bf16 else 'no-'}bf16 choose another precision; give one of "
            "them",
        )
        mistakes.require(
            not self.optimizer.cpu_offload or self.precision is not Precision.FP32,
            "--optimizer-cpu-offload needs --bf16: the HybridDeviceOptimizer of megatron-core "
            "0.16.1 keeps float32 copies of 16-bit weights, and refuses weights that are float32",
        )
        mistakes.require(
            not self.fp16 or self.cluster.expert == 1,
            "--fp16 with --expert-model-parallel-size above 1: megatron-core 0.16.1 scales the "
            "loss once, but follows the gradients of spread experts by a scale of their own; leave "
            "out --fp16 (bfloat16 needs no loss scale)",
        )
        mistakes.raise_all()

    def _check_evaluation(self) -> None:
        """Check that what needs rows to evaluate on has them, from one place."""
        if self.evaluation.sources and self.data.held_out_fraction:
            raise ConfigError(
                "--eval-prompt-data and --eval-fraction: give one of them, rows of their own or "
                "held-out ones"
            )
        if self.evaluation.sources or self.data.held_out_fraction:
            return

        mistakes = Mistakes()
        for flag, value in (
            ("--eval-interval", self.evaluation.interval),
            ("--eval-samples", self.evaluation.num_samples),
            ("--keep-best", self.keep_best),
        ):
            mistakes.require(
                not value,
                f"{flag} needs rows to evaluate on: --eval-prompt-data or --eval-fraction",
            )
        mistakes.raise_all()

    @property
    def precision(self) -> Precision | None:
        """Return the format to compute in; None: `for_device` has yet to choose it."""
        if self.fp16:
            return Precision.FP16
        if self.bf16 is None:
            return None
        return Precision.BF16 if self.bf16 else Precision.FP32

    def for_device(self, *, has_gpus: bool) -> Self:
        """Return the settings with those filled in that depend on the ranks' device.

        Raises:
            ConfigError: they cannot be kept on that device.
        """
        if not has_gpus:
            self.optimizer.require_cpu()
        return self if self.precision else replace(self, bf16=has_gpus)

    @property
    def streamed_data(self) -> DataConfig:
        """Return the data as the stream of the run takes it, which knows the steps it has to last.

        `data` without it ends after `num_epoch`, or one epoch.
        """
        return replace(self.data, order=replace(self.data.order, max_steps=self.num_rollout))

    @property
    def run_dir(self) -> str:
        return self.output_dir or self.save
