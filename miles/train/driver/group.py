"""The trainer actors of a run: where they are placed, and how they are called together."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles.architecture.config import ModelShape
from miles.common import checkpoint_folder
from miles.common.redact import redact
from miles.errors import ClusterError, MilesError, NoRoomError
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.parallel_layout import Layout
from miles.train.rank.actor import TrainerActor

ROOT_CAUSE_SECONDS = 10.0
"""After a rank has failed, for so long the others are heard: one that died is the cause, but not always seen first."""


class TrainerGroup:
    """The trainer actors of a run, called together.

    Args:
        on_gpu: each of them has one.

    Raises:
        NoRoomError: the cluster has no place for them.
    """

    def __init__(self, cluster: ClusterConfig, *, on_gpu: bool) -> None:
        self._timeout_seconds = cluster.timeout_minutes * 60
        self._place = self._reserve(cluster) if on_gpu else None
        # On a CPU the ranks reserve none: what Ray may use is the loader's budget, and nobody starves.
        actor = ray.remote(
            num_gpus=1 if on_gpu else 0, num_cpus=1 if on_gpu else 0, max_restarts=0
        )(TrainerActor)
        self._actors = [
            actor.options(scheduling_strategy=self._on_node(rank // cluster.gpus_per_node)).remote(
                rank
            )
            for rank in range(cluster.world_size)
        ]

    def setup(
        self,
        layout: Layout,
        shape: ModelShape,
        config: TrainConfig,
        num_steps: int,
        num_sources: int,
        found: checkpoint_folder.Found,
        model_only: bool,
    ) -> str | None:
        """Joins all ranks and loads the checkpoint into them; returns the GPU's name, None on a CPU."""
        address = self._wait("listen", [self._actors[0].listen.remote()])[0]
        names: list[str | None] = self.call(
            "setup", address, layout, shape, config, num_steps, num_sources, found, model_only
        )
        return names[0]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method on every rank and waits for all; results by rank.

        Raises:
            MilesError: what a rank raised of ours; `ClusterError` for any other error of a rank's, for one that died,
                and for one that did not answer in time.
        """
        return self._wait(
            method, [getattr(actor, method).remote(*arguments) for actor in self._actors]
        )

    def shut_down(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self._place is not None:
            remove_placement_group(self._place)

    def _reserve(self, cluster: ClusterConfig) -> PlacementGroup:
        """GPUs on as many nodes as are asked for, so that neighbouring ranks are on the same one."""
        bundle = {"GPU": cluster.gpus_per_node, "CPU": cluster.gpus_per_node}
        place = placement_group(
            [bundle] * cluster.num_nodes, "STRICT_SPREAD" if cluster.num_nodes > 1 else "PACK"
        )
        if not place.wait(self._timeout_seconds):
            remove_placement_group(place)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            there = ", ".join(
                f"{node.get('GPU', 0):g} GPU {node.get('CPU', 0):g} CPU" for node in nodes
            )
            raise NoRoomError(
                f"waited {self._timeout_seconds / 60:g} minutes (--distributed-timeout-minutes) for "
                f"{cluster.num_nodes} node(s) with {cluster.gpus_per_node} free GPUs and CPUs each (--actor-num-nodes, "
                f"--actor-num-gpus-per-node); Ray has {len(nodes)} node(s): {there}. Bring the missing one back, or "
                "start again with fewer: a checkpoint can be gone on from at any layout"
            )
        return place

    def _on_node(self, node: int) -> PlacementGroupSchedulingStrategy | None:
        if self._place is None:
            return None
        return PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=node)

    def _wait(self, method: str, references: list[Any]) -> list[Any]:
        pending = list(references)
        deadline = time.monotonic() + self._timeout_seconds
        while pending:  # one by one, so that the first failure is seen at once
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ClusterError(
                    f"{len(pending)} of {len(references)} trainers did not finish {method!r} within "
                    f"{self._timeout_seconds / 60:g} minutes (--distributed-timeout-minutes)"
                )
            problem, is_cause = self._problem(method, references, ready[0])
            if problem and not is_cause:
                # Such as gloo's and NCCL's of a peer that is gone. Who it was, Ray hears a little later.
                others = [self._problem(method, references, one) for one in _soon(pending)]
                problem = next((other for other, is_cause in others if is_cause), problem)
            if problem:
                raise problem
        return list(ray.get(references))

    def _problem(
        self, method: str, references: list[Any], reference: Any
    ) -> tuple[MilesError | None, bool]:
        """What a call that has ended raised, as an error of ours; and whether that is a cause, not one of another's."""
        rank = references.index(reference)
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MilesError):
                return error.cause, True
            said = f"{type(error.cause).__name__}: {_on_one_line(error.cause)}"
            return _caused_by(
                ClusterError(f"trainer {rank} failed during {method!r}: {said}"), error
            ), False
        except ray.exceptions.RayError as error:
            return _caused_by(
                ClusterError(f"trainer {rank} died during {method!r}: {_on_one_line(error)}"), error
            ), True
        return None, False


def _soon(pending: list[Any]) -> list[Any]:
    """Those that end within a few seconds."""
    return (
        list(ray.wait(pending, num_returns=len(pending), timeout=ROOT_CAUSE_SECONDS)[0])
        if pending
        else []
    )


def _on_one_line(error: object) -> str:
    return redact(" ".join(str(error).split()))[:500]


def _caused_by(error: MilesError, cause: BaseException) -> MilesError:
    error.__cause__ = cause
    return error
