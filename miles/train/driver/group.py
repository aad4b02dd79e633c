"""The trainer actors of a run: where they are placed, and how they are called together."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles.common import remote_errors
from miles.common.counts import counted
from miles.common.remote_errors import RemoteFailure
from miles.errors import LostError, NoRoomError
from miles.train.config import ClusterConfig
from miles.train.rank.actor import TrainerActor
from miles.train.types import (
    EvalSums,
    ExportPart,
    RankEnvironment,
    RankSetup,
    SaveFailure,
    SaveStage,
    StepResult,
)

ROOT_CAUSE_SECONDS = 10.0
"""The time that the other ranks are heard after one has failed.

A rank that died is the cause of all failures, but it is not always seen first.
"""

P = ParamSpec("P")
R = TypeVar("R")


class TrainerGroup:
    """The trainer actors of a run. Each method calls a method of `TrainerActor` on every rank.

    All of them raise a `MilesError`: one that a rank raised; a `LostError` for a rank that died,
    lost its peers or its GPU, or did not answer in time; a `RunError` for any other exception of a
    rank (`miles.common.remote_errors`).

    Args:
        on_gpu: each actor has a GPU.

    Raises:
        NoRoomError: the cluster has no place for them.
    """

    def __init__(self, cluster: ClusterConfig, *, on_gpu: bool) -> None:
        self._timeout_seconds = cluster.timeout_minutes * 60
        self._ranks_per_node = cluster.gpus_per_node
        self._place = self._reserve(cluster) if on_gpu else None

        # On a CPU the ranks reserve none: all that Ray has is the loader's, and nobody starves.
        num_each = 1 if on_gpu else 0
        actor = ray.remote(num_gpus=num_each, num_cpus=num_each, max_restarts=0)(TrainerActor)
        environment = RankEnvironment.of(cluster, os.environ, has_gpu=on_gpu)
        self._actors = []
        for rank in range(cluster.world_size):
            strategy = self._on_node(rank // cluster.gpus_per_node)
            self._actors.append(
                actor.options(scheduling_strategy=strategy).remote(rank, environment)
            )
            # Not waited for: the calls of an actor follow one another.
            self._actors[-1].load_modules.remote()

    def setup(self, setup: RankSetup) -> str | None:
        """Join the ranks and load the checkpoint. Return the GPU's name; None on a CPU."""
        address = self._wait("listen", [self._actors[0].listen.remote()])[0]
        return self._call(TrainerActor.setup, address, setup)[0]

    def attach_feed(self, feed_handle: Any, first_step: int, num_steps: int) -> None:
        """Have the ranks read their data from this feed."""
        self._call(
            TrainerActor.attach_feed, feed_handle, first_step, num_steps, self._ranks_per_node
        )

    def train_step(self) -> StepResult:
        """Train on the next step of the feed."""
        # The last rank is on the last pipeline stage, which has the result.
        return self._call(TrainerActor.train_step)[-1]

    def evaluate(self, references: Sequence[Sequence[Any]], num_sources: int) -> EvalSums:
        """Return the loss sums and token counts of an evaluation set."""
        return self._call(TrainerActor.evaluate, references, num_sources)[-1]

    def generate(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        """Return the most likely continuation of each prompt."""
        return self._call(TrainerActor.generate, prompts, stop_ids, max_tokens)[-1]

    def nodes_without(self, url: str) -> list[str]:
        """Return the names of the machines on which a rank does not see a file."""
        answers = self._call(TrainerActor.sees_file, url)
        return sorted({node for node, is_seen in answers if not is_seen})

    def begin_save(self, url: str, iteration: int, extra: dict[str, Any]) -> SaveFailure | None:
        """Begin a checkpoint; return why none was begun."""
        return self._call(TrainerActor.begin_save, url, iteration, extra)[0]

    def save_stages(self) -> list[SaveStage]:
        """Return how far each rank is with the checkpoint."""
        return self._call(TrainerActor.save_stage)

    def seal_save(self) -> SaveFailure | None:
        """Make a checkpoint of what all ranks have written; return why that failed."""
        return self._call(TrainerActor.seal_save)[0]

    def finish_uploads(self) -> SaveFailure | None:
        """End the uploads of all ranks; return why the first one failed that did."""
        failures = self._call(TrainerActor.finish_upload)
        return next((failure for failure in failures if failure is not None), None)

    def write_export(self, folder: str) -> list[ExportPart]:
        """Write the weights of all ranks into the files of an export."""
        return self._call(TrainerActor.write_export, folder)

    def shut_down(self) -> None:
        """End the actors, and free their place. A second call does nothing."""
        # After a loss, Ray itself may be gone: that is not to hide the loss.
        with contextlib.suppress(ray.exceptions.RayError):
            while self._actors:
                ray.kill(self._actors.pop())
            if self._place is not None:
                remove_placement_group(self._place)
                self._place = None

    def _call(
        self, method: Callable[Concatenate[TrainerActor, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Call a method on every rank and wait for all; return the results by rank."""
        name = method.__name__
        references = [getattr(actor, name).remote(*args, **kwargs) for actor in self._actors]
        return self._wait(name, references)

    def _reserve(self, cluster: ClusterConfig) -> PlacementGroup:
        """Reserve the GPUs node by node, so that neighbouring ranks share a node."""
        bundle = {"GPU": cluster.gpus_per_node, "CPU": cluster.gpus_per_node}
        strategy = "STRICT_SPREAD" if cluster.num_nodes > 1 else "PACK"
        place = placement_group([bundle] * cluster.num_nodes, strategy)
        if place.wait(self._timeout_seconds):
            return place

        remove_placement_group(place)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        available = [f"{node.get('GPU', 0):g} GPU {node.get('CPU', 0):g} CPU" for node in nodes]
        raise NoRoomError(
            f"waited {counted(self._timeout_seconds / 60, 'minute')} (--distributed-timeout-minutes) "
            f"for {counted(cluster.num_nodes, 'node')} with {cluster.gpus_per_node} free GPUs and "
            "CPUs each (--actor-num-nodes, --actor-num-gpus-per-node); Ray has "
            f"{counted(len(nodes), 'node')}: {', '.join(available)}. Bring the missing one back, or "
            "start again with fewer: a run can resume at any layout"
        )

    def _on_node(self, node: int) -> PlacementGroupSchedulingStrategy | None:
        if self._place is None:
            return None
        return PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=node)

    def _wait(self, method: str, references: list[Any]) -> list[Any]:
        """Return the results of calls, by rank; raise the cause of the first failure."""
        pending = list(references)
        deadline = time.monotonic() + self._timeout_seconds

        while pending:  # one by one, so that the first failure is seen at once
            ready, pending = _wait_for_one(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise LostError(
                    f"{len(pending)} of {len(references)} trainers did not finish {method!r} "
                    f"within {counted(self._timeout_seconds / 60, 'minute')} "
                    "(--distributed-timeout-minutes)"
                )

            _raise_cause(method, references, ready[0], pending)
        return list(ray.get(references))


def _wait_for_one(references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
    """Return the first calls that have ended, and the others.

    Ray 2.60 makes a `SystemError` of what a signal's handler raises just when the wait ends.
    """
    try:
        return ray.wait(references, timeout=timeout)
    except SystemError as error:
        raise error.__cause__ or error from None


def _failure_of(reference: Any) -> RemoteFailure | None:
    """Return how a call failed that has ended; None if it did not."""
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        return remote_errors.judge(error)
    return None


def _raise_cause(method: str, references: list[Any], first: Any, pending: list[Any]) -> None:
    """Raise the error that caused the failure of a call that has ended, if it did fail.

    A rank whose peer is gone fails in gloo or NCCL. Ray hears a little later which peer that was.

    Raises:
        MilesError: the cause.
    """
    failure = _failure_of(first)
    if failure is None:
        return
    rank = references.index(first)

    if failure.may_follow and pending:
        ended, _ = ray.wait(pending, num_returns=len(pending), timeout=ROOT_CAUSE_SECONDS)
        for reference in ended:
            other = _failure_of(reference)
            if other is not None and not other.may_follow:
                failure, rank = other, references.index(reference)
                break
    verb = "died" if failure.has_died else "failed"
    subject = f"trainer {rank} {verb} during {method!r}"
    raise failure.as_error(subject) from failure.source
