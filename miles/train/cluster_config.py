"""The settings of the cluster: its machines, and how the ranks on them share the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from miles.common.flags import Flag, check_settings
from miles.common.secret import Secret
from miles.errors import ConfigError
from miles.train.parallel_layout import Layout


@dataclass(frozen=True)
class ClusterConfig:
    """Parallelism and the cluster: where the ranks run."""

    num_nodes: Annotated[
        int, Flag("--actor-num-nodes", "NODES", "machines that the ranks run on", minimum=1)
    ] = 1
    gpus_per_node: Annotated[
        int,
        Flag(
            "--actor-num-gpus-per-node",
            "GPUS",
            "ranks on each node; on a machine without CUDA, CPU processes",
            minimum=1,
        ),
    ] = 1
    num_gpus_per_node: Annotated[
        int,
        Flag(
            "--num-gpus-per-node",
            "GPUS",
            "GPUs that a machine has; more ranks a node are refused",
            minimum=1,
        ),
    ] = 8
    tensor: Annotated[
        int,
        Flag(
            "--tensor-model-parallel-size",
            "RANKS",
            "ranks that share each layer's matrices",
            minimum=1,
        ),
    ] = 1
    pipeline: Annotated[
        int,
        Flag(
            "--pipeline-model-parallel-size",
            "RANKS",
            "stages that the layers are cut into",
            minimum=1,
        ),
    ] = 1
    expert: Annotated[
        int,
        Flag(
            "--expert-model-parallel-size",
            "RANKS",
            "ranks over which a layer's experts are spread",
            minimum=1,
        ),
    ] = 1
    expert_tensor: Annotated[
        int | None,
        Flag(
            "--expert-tensor-parallel-size",
            "RANKS",
            "ranks that share each expert's matrices",
            minimum=1,
            default="--tensor-model-parallel-size",
        ),
    ] = None
    sequence_parallel: Annotated[
        bool,
        Flag("--sequence-parallel", help="norms on a part of the tokens of each tensor rank"),
    ] = False
    ray_address: Annotated[
        str | None,
        Flag(
            "--ray-address",
            "ADDRESS",
            "a Ray that is running: HOST:PORT of its head node, auto (on this machine), or local for "
            "none; a dry run asks nobody there, and looks at the form alone",
            default="$RAY_ADDRESS, or a small one on localhost",
        ),
    ] = None
    timeout_minutes: Annotated[
        float,
        Flag(
            "--distributed-timeout-minutes",
            "MINUTES",
            "how long a collective, a step, an evaluation, a start or the end of a save may take",
            above=0,
        ),
    ] = 10.0
    train_env_vars: Annotated[
        Mapping[str, Secret],
        Flag(
            "--train-env-vars",
            "JSON",
            "environment variables of the ranks, set before torch is imported there; config.json "
            "gets their names only",
        ),
    ] = field(default_factory=dict)
    object_store_bytes: int = 512 << 20
    """of the run's own Ray"""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.gpus_per_node > self.num_gpus_per_node:
            raise ConfigError(
                f"--actor-num-gpus-per-node {self.gpus_per_node} is more than a machine has: "
                f"--num-gpus-per-node {self.num_gpus_per_node}"
            )
        for name in self.train_env_vars:
            if not name or "=" in name or "\0" in name:
                shown = name.split("=")[0]  # behind it may be a secret
                raise ConfigError(
                    f"--train-env-vars: {shown!r}: the name of a variable is not empty, and has no "
                    "= and no zero byte"
                )

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def layout(self) -> Layout:
        """The place of each rank.

        Raises:
            ConfigError: the ranks cannot be divided in this way.
        """
        return Layout(
            self.world_size,
            self.tensor,
            self.pipeline,
            self.sequence_parallel,
            self.expert,
            self.tensor if self.expert_tensor is None else self.expert_tensor,
        )
