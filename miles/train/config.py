"""The settings of a training run: frozen, checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from miles.data.config import DataConfig
from miles.errors import ConfigError
from miles.train.optimizer import OptimizerSettings


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run."""

    num_nodes: int = 1
    """`--actor-num-nodes`"""
    gpus_per_node: int = 1
    """`--actor-num-gpus-per-node`: ranks a node; on a machine without CUDA, CPU processes"""
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    ray_address: str | None = None
    """None: a small Ray of the run's own, on localhost"""
    timeout_minutes: float = 10.0
    """`--distributed-timeout-minutes`: how long a collective, a step or a start may take"""
    object_store_bytes: int = 512 << 20
    """of the run's own Ray"""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


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
    num_rollout: int | None = None
    """a limit in steps; None: as many as `num_epoch` has"""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: int = 1234
    bf16: bool = False
    use_tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.save_interval < 0:
            raise ConfigError(f"--save-interval must not be negative, got {self.save_interval}")
        if self.num_rollout is not None and self.num_rollout < 1:
            raise ConfigError(f"--num-rollout must be positive, got {self.num_rollout}")

    @property
    def run_dir(self) -> str:
        return self.output_dir or self.save
