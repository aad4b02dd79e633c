"""The run: feed -> step -> log -> checkpoint, driven over a group of trainer actors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console

from miles import local_ray, storage
from miles.architecture import ModelShape
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.data.feed import Feed
from miles.data.types import Cursor
from miles.errors import CheckpointError, ClusterError, MilesError
from miles.train import checkpoint
from miles.train.actor import TrainerActor
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.evaluate import Evaluator
from miles.train.journal import Journal
from miles.train.loggers import MetricsLog, open_boards
from miles.train.metrics import RunFacts, Standing, step_metrics
from miles.train.optimizer import check_schedule
from miles.train.progress import ProgressLine
from miles.train.skips import SkippedSteps
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
    layout.require_fits(shape)
    if config.save_hf:
        storage.filesystem(config.save_hf)  # a URL that is refused shall not be so after the last step only
    found, resuming = find_start(config)
    state = found.extra if resuming and found.extra else {}
    cursor = Cursor.from_json(json.dumps(state["cursor"]), found.url) if state else None
    with ray_cluster(config), contextlib.ExitStack() as cleanup:
        journal = cleanup.enter_context(Journal(config.run_dir, console))
        evaluator = Evaluator.open(config, journal)
        feed = Feed.open(
            config.data, cursor=cursor, cursor_path=found.url, num_ranks=layout.world_size, run_dir=config.run_dir
        )
        cleanup.callback(feed.close)
        num_steps = min(feed.info.num_steps, config.num_rollout or feed.info.num_steps)
        check_schedule(config.optimizer, num_steps)
        if feed.first_step >= num_steps:
            raise CheckpointError(f"{found.url}: this run is finished: {feed.first_step} of {num_steps} steps done")
        storage.write_text(storage.join(config.run_dir, "config.json"), describe(config))
        boards = open_boards(config.logging, config.run_dir, feed.first_step, dataclasses.asdict(config))
        log = cleanup.enter_context(MetricsLog(config.run_dir, state.get("metrics_lines", 0), boards))
        group = TrainerGroup(config.cluster)
        cleanup.callback(group.shut_down)
        device = group.setup(layout, shape, config, num_steps, len(feed.info.source_names), found, not resuming)
        group.call("attach", feed.handle, feed.first_step, num_steps)
        start = f"going on at step {feed.first_step} from {found.url}" if resuming else f"from {found.url}"
        journal.say(
            f"{feed.info.num_rows:,} rows in {len(feed.info.source_names)} source(s), {num_steps} steps of "
            f"{config.data.order.batch_size} rows; {layout.world_size} trainers, {start}"
        )
        facts = RunFacts(feed.info.source_names, shape, layout.world_size, device if config.bf16 else None)
        run = _Run(config, console, journal, facts, feed, group, log, evaluator, num_steps)
        return run.to_the_end(state.get("skipped_steps", 0))


@dataclasses.dataclass(frozen=True)
class _Run:
    """All that a run has to do with, started."""

    config: TrainConfig
    console: Console
    journal: Journal
    facts: RunFacts
    feed: Feed
    group: TrainerGroup
    log: MetricsLog
    evaluator: Evaluator | None
    num_steps: int

    def to_the_end(self, num_skipped: int) -> RunSummary:
        """Every step that is left.

        Args:
            num_skipped: steps that were skipped before.
        """
        config, feed, group = self.config, self.feed, self.group
        progress = ProgressLine(self.console, self.num_steps, feed.first_step)
        skips = SkippedSteps(config.run_dir, config.max_skipped_steps, feed.first_step, num_skipped, feed.locate)
        losses: list[float] = []
        folder = ""
        last = time.perf_counter()
        try:
            for step in range(feed.first_step, self.num_steps):
                result = group.call("train_step")[-1]  # the last rank is on the last pipeline stage
                report = feed.commit(step)
                seconds = time.perf_counter() - last
                if said := skips.count(step, result):
                    self.journal.say(said)
                metrics = step_metrics(self.facts, report, result, self._standing(skips.total, seconds))
                done = step + 1
                is_last = done == self.num_steps
                is_saved = is_last or (config.save_interval > 0 and done % config.save_interval == 0)
                eval_loss = None
                if self.evaluator and self.evaluator.is_due(done, is_last=is_last, is_saved=is_saved):
                    evaluated = self.evaluator.run(group, done)
                    eval_loss = float(evaluated["eval/loss"])
                    metrics.update(evaluated)
                self.log.write(metrics)
                progress.update(metrics)
                losses.append(result.loss)
                if is_saved:
                    folder = self._save(done, skips.total, eval_loss)
                    self.journal.say(f"checkpoint  {folder}")
                    self._after_save(done, is_last)
                last = time.perf_counter()
        finally:
            progress.stop()
        storage.write_text(storage.join(config.run_dir, "ledger.json"), json.dumps(feed.ledger_summary(), indent=1))
        feed.finish()
        return RunSummary(len(losses), losses[0], losses[-1], feed.cursor().tokens_seen, folder)

    def _standing(self, num_skipped: int, seconds: float) -> Standing:
        feed = self.feed
        return Standing(feed.source_epochs(), feed.cursor().tokens_seen, num_skipped, seconds)

    def _save(self, done: int, num_skipped: int, eval_loss: float | None) -> str:
        """Writes a checkpoint; returns its folder."""
        self.log.flush()
        extra = {
            "cursor": json.loads(self.feed.cursor().to_json()),
            "metrics_lines": self.log.num_lines,
            "skipped_steps": num_skipped,
            "eval_loss": eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        }
        folder: str = self.group.call("save", self.config.save, done, extra)[0]
        return folder

    def _after_save(self, done: int, is_last: bool) -> None:
        """Exports to Hugging Face's format where asked, and removes old checkpoints."""
        config = self.config
        if config.save_hf and (is_last or "{rollout_id}" in config.save_hf):
            folder = megatron_to_hf(
                config.save, config.hf_checkpoint, config.save_hf.replace("{rollout_id}", str(done))
            )
            self.journal.say(f"Hugging Face checkpoint  {folder}")
        for folder in checkpoint.remove_old(config.save, config.keep_last, config.keep_best):
            self.journal.write(f"removed  {folder}")
        self.journal.flush()


class TrainerGroup:
    """The trainer actors of a run, called together.

    Raises:
        ClusterError: the cluster has no place for them.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self._timeout_seconds = cluster.timeout_minutes * 60
        on_gpu = ray.cluster_resources().get("GPU", 0) >= cluster.world_size
        self._place = self._reserve(cluster) if on_gpu else None
        # On a CPU the ranks reserve none: what Ray may use is the loader's budget, and nobody starves.
        actor = ray.remote(num_gpus=1 if on_gpu else 0, num_cpus=1 if on_gpu else 0, max_restarts=0)(TrainerActor)
        self._actors = [
            actor.options(scheduling_strategy=self._on_node(rank // cluster.gpus_per_node)).remote(rank)
            for rank in range(cluster.world_size)
        ]

    def setup(
        self,
        layout: Layout,
        shape: ModelShape,
        config: TrainConfig,
        num_steps: int,
        num_sources: int,
        found: checkpoint.Found,
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
            MilesError: what a rank raised, or a rank that died, or none that answered in time.
        """
        return self._wait(method, [getattr(actor, method).remote(*arguments) for actor in self._actors])

    def shut_down(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self._place is not None:
            remove_placement_group(self._place)

    def _reserve(self, cluster: ClusterConfig) -> PlacementGroup:
        """GPUs on as many nodes as are asked for, so that neighbouring ranks are on the same one."""
        bundle = {"GPU": cluster.gpus_per_node, "CPU": cluster.gpus_per_node}
        place = placement_group([bundle] * cluster.num_nodes, "STRICT_SPREAD" if cluster.num_nodes > 1 else "PACK")
        if not place.wait(self._timeout_seconds):
            raise ClusterError(
                f"no {cluster.num_nodes} node(s) with {cluster.gpus_per_node} free GPUs and CPUs each came up within "
                f"{self._timeout_seconds / 60:g} minutes (--actor-num-nodes, --actor-num-gpus-per-node); Ray has "
                f"{ray.available_resources()} left"
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
    address = config.cluster.ray_address or os.environ.get("RAY_ADDRESS")  # a submitted job finds its cluster there
    if started and address:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    elif started:
        num_cpus = None if torch.cuda.is_available() else config.data.stream.loader_cpus
        local_ray.start(num_cpus, config.cluster.object_store_bytes)
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
