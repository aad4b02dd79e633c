"""The run: feed -> step -> log -> checkpoint, driven over a group of trainer actors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import ray
from rich.console import Console

from miles import storage
from miles.architecture import ModelShape
from miles.data.feed import Feed
from miles.data.types import Cursor
from miles.errors import CheckpointError, ClusterError, MilesError
from miles.train import checkpoint
from miles.train.actor import TrainerActor
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.metrics import MetricsLog, ProgressLine, step_metrics
from miles.train.optimizer import check_schedule
from miles.train.topology import Layout


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    num_steps: int
    first_loss: float
    last_loss: float
    tokens_seen: int
    checkpoint: str
    """folder of the last checkpoint"""


def train(config: TrainConfig, console: Console | None = None) -> RunSummary:
    """Trains to the end of the data, or to `num_rollout` steps, going on from a checkpoint in `config.save`.

    Raises:
        MilesError: a setting, file, checkpoint or cluster that cannot be used.
    """
    console = console or Console()
    shape = ModelShape.from_hf_folder(config.hf_checkpoint)
    layout = config.cluster.layout
    found, resuming = find_start(config)
    cursor = Cursor.from_json(json.dumps(found.extra["cursor"]), found.url) if resuming and found.extra else None
    with ray_cluster(config), contextlib.ExitStack() as cleanup:
        feed = Feed.open(
            config.data, cursor=cursor, cursor_path=found.url, num_ranks=layout.world_size, run_dir=config.run_dir
        )
        cleanup.callback(feed.close)
        num_steps = min(feed.info.num_steps, config.num_rollout or feed.info.num_steps)
        check_schedule(config.optimizer, num_steps)
        if feed.first_step >= num_steps:
            raise CheckpointError(f"{found.url}: this run is finished: {feed.first_step} of {num_steps} steps done")
        storage.write_text(storage.join(config.run_dir, "config.json"), describe(config))
        group = TrainerGroup(layout, config.cluster)
        cleanup.callback(group.shut_down)
        group.setup(shape, config, num_steps, len(feed.info.source_names), found, model_only=not resuming)
        group.call("attach", feed.handle, feed.first_step, num_steps)
        log = MetricsLog(
            config.run_dir,
            found.extra["metrics_lines"] if resuming and found.extra else 0,
            tensorboard=config.logging.use_tensorboard,
        )
        cleanup.callback(log.close)
        console.print(
            f"  {feed.info.num_rows:,} rows in {len(feed.info.source_names)} source(s), {num_steps} steps of "
            f"{config.data.order.batch_size} rows; {layout.world_size} trainers"
            + (f"; going on at step {feed.first_step}" if resuming else "")
        )
        return _run(config, console, shape, layout, feed, group, log, num_steps)


def _run(
    config: TrainConfig,
    console: Console,
    shape: ModelShape,
    layout: Layout,
    feed: Feed,
    group: TrainerGroup,
    log: MetricsLog,
    num_steps: int,
) -> RunSummary:
    progress = ProgressLine(console, num_steps, feed.first_step)
    losses: list[float] = []
    folder = ""
    last = time.perf_counter()
    try:
        for step in range(feed.first_step, num_steps):
            result = group.call("train_step")[-1]  # the last rank is on the last pipeline stage
            report = feed.commit(step)
            now = time.perf_counter()
            tokens_seen = feed.cursor().tokens_seen
            metrics = step_metrics(
                report,
                result,
                feed.info.source_names,
                feed.source_epochs(),
                tokens_seen,
                now - last,
                layout.world_size,
                shape,
            )
            last = now
            log.write(metrics)
            progress.update(metrics)
            losses.append(result.loss)
            done = step + 1
            if done == num_steps or (config.save_interval and done % config.save_interval == 0):
                log.flush()
                extra = {"cursor": json.loads(feed.cursor().to_json()), "metrics_lines": log.num_lines}
                folder = group.call("save", config.save, done, extra)[0]
                progress.say(f"  checkpoint  {folder}")
    finally:
        progress.stop()
    storage.write_text(storage.join(config.run_dir, "ledger.json"), json.dumps(feed.ledger_summary(), indent=1))
    feed.finish()
    return RunSummary(len(losses), losses[0], losses[-1], feed.cursor().tokens_seen, folder)


class TrainerGroup:
    """The trainer actors of a layout, called together."""

    def __init__(self, layout: Layout, cluster: ClusterConfig) -> None:
        on_gpu = ray.cluster_resources().get("GPU", 0) >= layout.world_size
        self._timeout_seconds = cluster.timeout_minutes * 60
        # On a CPU the ranks reserve none: what Ray may use is the loader's budget, and nobody starves.
        actor = ray.remote(num_gpus=1 if on_gpu else 0, num_cpus=1 if on_gpu else 0, max_restarts=0)(TrainerActor)
        self._actors = [actor.remote(layout, rank) for rank in range(layout.world_size)]

    def setup(
        self,
        shape: ModelShape,
        config: TrainConfig,
        num_steps: int,
        num_sources: int,
        found: checkpoint.Found,
        *,
        model_only: bool,
    ) -> None:
        """Joins all ranks and loads the checkpoint into them."""
        address = self._wait("address", [self._actors[0].address.remote()])[0]
        self.call(
            "setup",
            address,
            shape,
            config.optimizer,
            num_steps,
            num_sources,
            config.bf16,
            config.seed,
            config.cluster.timeout_minutes,
            found,
            model_only,
        )

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method on every rank and waits for all; results by rank.

        Raises:
            MilesError: what a rank raised, or a rank that died, or none that answered in time.
        """
        return self._wait(method, [getattr(actor, method).remote(*arguments) for actor in self._actors])

    def shut_down(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

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
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, MilesError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayActorError as error:
                raise ClusterError(f"a trainer died during {method!r}: {error}") from error
        return list(ray.get(references))


def find_start(config: TrainConfig) -> tuple[checkpoint.Found, bool]:
    """The checkpoint to begin from, and whether it is one of this run's own to go on from.

    Raises:
        CheckpointError: no weights at all.
    """
    for url in (config.load, config.save):
        found = checkpoint.find(url) if url else None
        if found is not None and found.extra is not None:
            return found, True
    found = checkpoint.find(config.ref_load)
    if found is None:
        raise CheckpointError(
            f"{config.ref_load}: no Megatron checkpoint there (no {checkpoint.TRACKER}). Make one with: miles convert "
            f"hf-to-megatron --hf-checkpoint {config.hf_checkpoint} --save {config.ref_load}"
        )
    return found, False


def describe(config: TrainConfig) -> str:
    """The resolved configuration, as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1, default=str)


@contextlib.contextmanager
def ray_cluster(config: TrainConfig) -> Iterator[None]:
    """The Ray that is running, the one asked for, or a small one of the run's own, which ends with the run.

    Raises:
        ClusterError: it cannot hold the trainers beside the loader.
    """
    started = not ray.is_initialized()
    if started:
        own = config.cluster.ray_address is None
        ray.init(
            address=config.cluster.ray_address,
            include_dashboard=False if own else None,
            num_cpus=config.data.stream.loader_cpus if own and not _has_gpu() else None,
            object_store_memory=config.cluster.object_store_bytes if own else None,
            log_to_driver=False,
            logging_level="error",
        )
    try:
        need = config.data.stream.loader_cpus
        have = ray.cluster_resources()
        if have.get("GPU", 0):
            need += config.cluster.world_size
            if have["GPU"] < config.cluster.world_size:
                raise ClusterError(f"{config.cluster.world_size} trainers need a GPU each; Ray has {have['GPU']:g}")
        if have.get("CPU", 0) < need:
            raise ClusterError(
                f"Ray has {have.get('CPU', 0):g} CPUs; the trainers and --loader-cpus "
                f"{config.data.stream.loader_cpus} need {need}"
            )
        yield
    finally:
        if started:
            ray.shutdown()


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
