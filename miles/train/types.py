"""The records that pass between the driver and the ranks. They need no torch.

driver  -- RankSetup -->             rank    once an attempt: settings, and where to begin
driver  <-- StepResult --            rank    after each step
driver  <-- EvalSums --              rank    after each evaluation
driver  <-- SaveStage, SaveFailure   rank    while a checkpoint is written
driver  <-- ExportPart               rank    after each export of the weights
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum, auto

from miles.architecture.adapter import AdapterShape
from miles.architecture.config import ModelShape
from miles.common import adapter_base, checkpoint_folder, own_files, run_folder, run_record, storage
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.data.types import Cursor
from miles.errors import BrokenFileError, CheckpointError, MissingFileError
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig

NUM_NAMED_WEIGHTS = 3
"""Weights that an error names, at most."""

GPU_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_NVLS_ENABLE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
"""Variables that a rank with a GPU gets unless the user has set them."""


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of adapters that a rank trains beside frozen weights."""

    adapter: AdapterShape
    dropout: float
    """share of an adapter's input that is dropped in training"""
    seed: int
    """of the first A, and of what is dropped"""

    @classmethod
    def of(cls, config: TrainConfig, shape: ModelShape) -> AdapterSettings | None:
        """Return the settings of a run's adapters; None: all weights are trained.

        Raises:
            ConfigError: a target that the model does not have.
        """
        adapter = config.lora.adapter(shape)
        return None if adapter is None else cls(adapter, config.lora.dropout, config.seed)


@dataclass(frozen=True)
class TrainerSettings:
    """The settings that a rank builds its trainer from; equal on all ranks."""

    shape: ModelShape
    layout: Layout
    optimizer: OptimizerSettings
    num_steps: int
    """steps of the whole run, for the learning-rate schedule"""
    num_sources: int
    """sources of the training data"""
    precision: Precision
    recompute: RecomputeConfig = KEEP_ALL
    """activations that are computed again in the backward pass"""
    compute: ComputeConfig = AS_USUAL
    lora: AdapterSettings | None = None
    """None: all weights are trained"""


@dataclass(frozen=True)
class RankEnvironment:
    """The environment variables for a rank, as far as the driver knows them."""

    has_gpu: bool
    given: Mapping[str, str] = field(default_factory=dict, repr=False)
    """of --train-env-vars; they may hold secrets"""
    of_driver: Mapping[str, str] = field(default_factory=dict)
    """those of `GPU_VARIABLES` that the user has set for the driver; they count where the rank has
    none of its own"""

    @classmethod
    def of(
        cls, cluster: ClusterConfig, driver: Mapping[str, str], *, has_gpu: bool
    ) -> RankEnvironment:
        """Return the environment of a run's ranks.

        Args:
            driver: the environment of the driver.
        """
        given = {name: secret.reveal() for name, secret in cluster.train_env_vars.items()}
        of_driver = {name: driver[name] for name in GPU_VARIABLES if name in driver}
        return cls(has_gpu, given, of_driver)


@dataclass(frozen=True)
class StartPoint:
    """The checkpoint that an attempt begins from."""

    checkpoint: SavedCheckpoint
    is_resume: bool
    """True: optimizer, schedule and data continue from it. False: only its weights count."""
    base: SavedCheckpoint | None = None
    """of a LoRA run that continues: the frozen weights, of which its checkpoints hold none"""
    adapter_path: str | None = None
    """of a LoRA run that begins: a folder in PEFT's format with the adapter to begin from"""

    @classmethod
    def find(cls, config: TrainConfig) -> StartPoint:
        """Return the checkpoint that the next attempt of a run begins from.

        It is the newest one of the run (`--save`), else of the run to continue (`--load`), else the
        weights to begin with: those of `--ref-load`, or of `--hf-checkpoint`.

        Raises:
            CheckpointError: there are no weights at all; or a run has been in these folders, and
                what would tell where it stands is missing.
        """
        own = checkpoint_folder.find(config.save)
        if own is None or own.is_converted:
            run_record.require_new(config.save, config.run_dir)
        elif own.extra is None:
            run_record.require_position(own.url, config.save, config.run_dir)
        checkpoint, is_resume = checkpoint_folder.find_start(
            config.save, config.load, config.ref_load, config.hf_checkpoint
        )
        if not config.lora.is_on:
            return cls(checkpoint, is_resume)
        if not is_resume:
            return cls(checkpoint, False, adapter_path=config.lora.adapter_path)
        base = None
        if checkpoint.has_adapter:  # else `require_same_training` refuses it
            base = adapter_base.find_base(
                checkpoint, config.load, config.ref_load, config.hf_checkpoint
            )
        return cls(checkpoint, True, base)

    @property
    def url(self) -> str:
        """Return the folder of the checkpoint."""
        return self.checkpoint.url

    @property
    def origin(self) -> str:
        """Return what the ranks load, for the user."""
        if self.base is not None:
            return f"the weights of {self.base.url} and the adapter of {self.url}"
        if self.adapter_path is not None:
            return f"the weights of {self.url} and the adapter of {self.adapter_path}"
        return f"the weights of {self.url}"

    @property
    def next_step(self) -> int:
        """Return the first step that is not in it."""
        return self.checkpoint.iteration if self.is_resume else 0

    def frozen_weights(self, config: TrainConfig) -> SavedCheckpoint | None:
        """Return the checkpoint of a LoRA run's frozen weights; None: all weights are trained."""
        return (self.base or self.checkpoint) if config.lora.is_on else None

    def cursor(self) -> Cursor | None:
        """Return the position in the data to resume from; None: the run begins.

        Raises:
            CheckpointError: a cursor that cannot be read.
        """
        if not self.is_resume or self.checkpoint.extra is None:
            return None
        where = storage.join(self.url, checkpoint_folder.EXTRA)
        try:
            return Cursor.from_json(json.dumps(self.checkpoint.extra.get("cursor")), where)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {checkpoint_folder.other_ways(self.url)}") from error

    def trained_in(self, config: TrainConfig) -> Precision | None:
        """Return the precision of a checkpoint that is resumed; None: it is not known.

        Older ones do not state it; the resolved settings in the run's folder mostly do.
        """
        if not self.is_resume:
            return None
        stated = Precision.named((self.checkpoint.extra or {}).get(checkpoint_folder.PRECISION))
        if stated is not None:
            return stated

        save = self.url.rsplit("/", 1)[0]
        run_dir = config.run_dir if storage.is_same(save, config.save) else save
        return _precision_of_settings(storage.join(run_dir, run_folder.CONFIG))

    def continued(self, config: TrainConfig) -> TrainConfig:
        """Return the settings with the precision of the checkpoint, unless one is given."""
        trained_in = self.trained_in(config)
        if config.precision is not None or trained_in is None:
            return config
        if trained_in is Precision.FP16:
            return replace(config, fp16=True)
        return replace(config, bf16=trained_in is Precision.BF16)


def _precision_of_settings(path: str) -> Precision | None:
    """Return the precision in a file of resolved settings; None where it has none."""
    try:
        settings = own_files.read_object(path)
    except (MissingFileError, BrokenFileError):
        return None
    if settings.get("fp16") is True:
        return Precision.FP16
    if not isinstance(settings.get("bf16"), bool):
        return None
    return Precision.BF16 if settings["bf16"] else Precision.FP32


@dataclass(frozen=True)
class RankSetup:
    """The settings and the start of an attempt, for a rank; equal on all ranks."""

    settings: TrainerSettings
    start: StartPoint
    seed: int
    timeout_minutes: float
    """limit of one collective operation"""
    is_deterministic: bool = False

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        shape: ModelShape,
        start: StartPoint,
        *,
        num_steps: int,
        num_sources: int,
    ) -> RankSetup:
        """Return the setup of a run's ranks.

        Args:
            config: of which the device is known (`for_device`).
            num_steps: of the whole run.
            num_sources: of the training data.
        """
        assert config.precision is not None, "the ranks' device is known"
        settings = TrainerSettings(
            shape,
            config.cluster.layout,
            config.optimizer,
            num_steps,
            num_sources,
            config.precision,
            recompute=config.recompute,
            compute=config.compute,
            lora=AdapterSettings.of(config, shape),
        )
        return cls(
            settings, start, config.seed, config.cluster.timeout_minutes, config.deterministic
        )


class SkipReason(StrEnum):
    """The reasons for which a step takes no optimizer step."""

    NOTHING_TO_TRAIN = "nothing to train"
    """All rows of the step were dropped. It says nothing about the model."""
    LOSS_NOT_FINITE = "the loss is not finite"
    GRADIENT_NOT_FINITE = "the gradient is not finite"
    LOSS_SCALE_TOO_HIGH = "the scaled gradient does not fit float16; the loss scale falls"
    """It says nothing about the model: of float16 only, while the scale is still falling."""


@dataclass(frozen=True)
class Skip:
    """The reason for which a step took no optimizer step, and the rows behind it."""

    reason: SkipReason
    row_ids: tuple[int, ...] = ()
    """Rows whose loss is not finite. All rows of the step where only the gradient is not; none
    where there was nothing to train, or where weights are not finite."""
    weights: tuple[str, ...] = ()
    """Weights that are not finite themselves: no row is to blame, and no later step mends them."""


def named(weights: Sequence[str]) -> str:
    """Return the names of some weights as a text: the first few of many."""
    text = ", ".join(weights[:NUM_NAMED_WEIGHTS])
    if len(weights) > NUM_NAMED_WEIGHTS:
        text += f" and {len(weights) - NUM_NAMED_WEIGHTS} more"
    return text


@dataclass(frozen=True)
class RouterStats:
    """The division of a step's tokens among the experts.

    `max_load` and `entropy` are those of the layer that divided them worst.
    """

    max_load: float
    """tokens of the fullest expert / mean over the experts of its layer; 1 is even"""
    entropy: float
    """of the shares of a layer's experts, in nats; at most the logarithm of their number"""
    aux_loss: float | None = None
    """the balancing loss, without its coefficient; None: there is none"""


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step; equal on every rank of the last pipeline stage."""

    source_losses: tuple[float, ...]
    """loss summed over each source's trained tokens"""
    source_tokens: tuple[int, ...]
    """trained tokens of each source"""
    grad_norm: float
    """global norm of the gradient before it is clipped; NaN where the loss was not finite"""
    lr: float
    """learning rate that this step used"""
    seconds: float
    skip: Skip | None = None
    """None: the optimizer step was taken"""
    router: RouterStats | None = None
    """None: the model has no experts, or there was nothing to train"""

    @property
    def num_tokens(self) -> int:
        """Return the number of trained tokens of the global batch."""
        return sum(self.source_tokens)

    @property
    def loss(self) -> float:
        """Return the mean over all trained tokens of the global batch; NaN where there are none."""
        if not self.num_tokens:
            return float("nan")
        return sum(self.source_losses) / self.num_tokens


@dataclass(frozen=True)
class EvalSums:
    """The outcome of an evaluation, over all data-parallel ranks."""

    source_losses: list[float]
    """loss summed over each source's trained tokens"""
    source_tokens: list[int]
    """trained tokens of each source"""


class SaveStage(Enum):
    """The stage of a rank with its part of a checkpoint. Only a remote one is uploaded."""

    WRITING = auto()
    WRITTEN = auto()
    UPLOADING = auto()
    UPLOADED = auto()
    """All its files have arrived, or one could not be uploaded: `finish_upload` tells."""


@dataclass(frozen=True)
class SaveFailure:
    """The failure of a checkpoint that could not be written."""

    reason: str
    remedy: str = ""
    """what mends it; "" where the reason says so, or the number of its error does"""


@dataclass(frozen=True)
class ExportPart:
    """A rank's part of an export to Hugging Face's format, as far as it was written."""

    num_bytes: int
    failure: SaveFailure | None = None
    """why it could not write its part"""
