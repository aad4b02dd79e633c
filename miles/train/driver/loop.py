"""The run: feed -> step -> log -> checkpoint, over a group of trainer actors that is started again when one is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator

import ray
import torch
from rich.console import Console

from miles.architecture.config import ModelShape
from miles.architecture.families import read_shape
from miles.common import checkpoint_folder, local_ray, run_folder, storage
from miles.common.checkpoint_folder import find_start
from miles.common.checkpoint_tracker import folder_name
from miles.convert.megatron_to_hf import megatron_to_hf, require_replaceable
from miles.data.stream.feed import Feed
from miles.data.types import Cursor
from miles.errors import CheckpointError, ClusterError, NoRoomError
from miles.train.config import TrainConfig, check_schedule
from miles.train.driver.attempts import Starts
from miles.train.driver.checkpoint_manager import Saves
from miles.train.driver.evaluator import Evaluator
from miles.train.driver.group import TrainerGroup
from miles.train.driver.metrics import RunFacts, Standing, step_metrics
from miles.train.driver.preemption import Stopped, StopSignal
from miles.train.driver.progress import ProgressLine
from miles.train.driver.run_log import Journal
from miles.train.driver.sinks import MetricsLog, open_boards
from miles.train.driver.skipped_steps import SkippedSteps


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    num_steps: int
    """trained since the last start; 0: it was finished before, or told to stop before the first"""
    first_loss: float
    last_loss: float
    tokens_seen: int
    checkpoint: str
    """folder of the last checkpoint"""
    next_step: int
    is_finished: bool
    """no step is left; else SIGTERM came, and the same call goes on"""


def train(config: TrainConfig, console: Console | None = None) -> RunSummary:
    """Trains to the end of the data, or to `num_rollout` steps, going on from a checkpoint in `config.save`.

    A rank, feed or stage that is lost ends all of them; they are started again from the last complete checkpoint, up to
    `config.max_restarts` times without a new one. SIGTERM ends the step that is under way, saves, and returns.

    Raises:
        MilesError: a setting, file, checkpoint or cluster that cannot be used.
    """
    console = console or Console()
    shape = read_shape(config.hf_checkpoint)
    config.cluster.layout.require_fits(shape)
    if config.save_hf:
        require_replaceable(config.save_hf, config.hf_checkpoint)  # not after the last step only
    found, is_own = find_start(
        (config.save, config.load), config.ref_load, config.hf_checkpoint
    )  # before anything is started: it may not be there
    with (
        ray_cluster(config) as on_gpu,
        StopSignal() as stop,
        Journal(config.run_dir, console) as journal,
    ):
        starts = Starts(config.run_dir)
        failed_from, failures = "", 0
        while True:
            try:
                return _start(
                    config,
                    console,
                    shape,
                    journal,
                    starts,
                    stop,
                    found,
                    is_own=is_own,
                    on_gpu=on_gpu,
                )
            except Stopped:
                journal.say("SIGTERM: stopping before the first step")
                nan = float("nan")
                return RunSummary(
                    0, nan, nan, 0, found.url, found.iteration if is_own else 0, is_finished=False
                )
            except NoRoomError:
                raise
            except ClusterError as error:
                failures = failures + 1 if found.url == failed_from else 1
                failed_from = found.url
                if failures > config.max_restarts:
                    raise
                journal.say(" ".join(str(error).split()))  # Ray's are of many lines
                journal.say(
                    f"starting again from the last complete checkpoint (restart {failures} from it; --max-restarts "
                    f"{config.max_restarts})"
                )
                starts.restarts()
                found, is_own = find_start(
                    (config.save, config.load), config.ref_load, config.hf_checkpoint
                )


def _start(
    config: TrainConfig,
    console: Console,
    shape: ModelShape,
    journal: Journal,
    starts: Starts,
    stop: StopSignal,
    found: checkpoint_folder.Found,
    *,
    is_own: bool,
    on_gpu: bool,
) -> RunSummary:
    """From a checkpoint to the end, or to what breaks it off."""
    layout = config.cluster.layout
    state = found.extra if is_own and found.extra else {}
    cursor = Cursor.from_json(json.dumps(state["cursor"]), found.url) if state else None
    with contextlib.ExitStack() as cleanup:
        evaluator = Evaluator.open(config, journal)
        feed = Feed.open(
            config.data,
            cursor=cursor,
            cursor_path=found.url,
            num_ranks=layout.world_size,
            run_dir=config.run_dir,
        )
        cleanup.callback(feed.close)
        num_steps = min(feed.info.num_steps, config.num_rollout or feed.info.num_steps)
        check_schedule(config.optimizer, num_steps)
        if feed.first_step >= num_steps:
            return _finished_before(config, journal, feed, found, num_steps)
        for name in checkpoint_folder.remove_unfinished(config.save):
            journal.write(f"removed  {name}, a checkpoint that was never complete")
        storage.write_text(storage.join(config.run_dir, run_folder.CONFIG), describe(config))
        boards = open_boards(
            config.logging, config.run_dir, feed.first_step, dataclasses.asdict(config)
        )
        log = cleanup.enter_context(
            MetricsLog(config.run_dir, state.get("metrics_lines", 0), boards)
        )
        group = TrainerGroup(config.cluster, on_gpu=on_gpu)
        cleanup.callback(group.shut_down)
        device = group.setup(
            layout, shape, config, num_steps, len(feed.info.source_names), found, not is_own
        )
        require_shared(config.save, group)
        group.call("attach", feed.handle, feed.first_step, num_steps)
        reason = starts.begin(feed.first_step, found.url, layout)
        start = (
            f"going on at step {feed.first_step} from {found.url} ({reason})"
            if is_own
            else f"from {found.url}"
        )
        journal.say(
            f"{feed.info.num_rows:,} rows in {len(feed.info.source_names)} source(s), {num_steps} steps of "
            f"{config.data.order.batch_size} rows; {layout.world_size} trainers, {start}"
        )
        facts = RunFacts(
            feed.info.source_names, shape, layout.world_size, device if config.bf16 else None
        )
        run = _Run(
            config, console, journal, facts, feed, group, log, evaluator, stop, num_steps, found.url
        )
        try:
            summary = run.to_the_end(state.get("skipped_steps", 0))
        except BaseException as error:
            starts.end(f"{type(error).__name__}: {error}", run.next_step)
            raise
        starts.end("the last step" if summary.is_finished else "SIGTERM", summary.next_step)
        return summary


def _finished_before(
    config: TrainConfig,
    journal: Journal,
    feed: Feed,
    found: checkpoint_folder.Found,
    num_steps: int,
) -> RunSummary:
    """Nothing is left to train; what comes after the last step, a start that was broken off there may have left."""
    journal.say(f"this run is finished: {feed.first_step} of {num_steps} steps are in {found.url}")
    _write_ledger(config, feed)
    if config.save_hf:
        target = config.save_hf.replace("{rollout_id}", str(found.iteration))
        if not storage.exists(storage.join(target, "config.json")):
            _export(config, found.url, target, journal)
    nan = float("nan")
    return RunSummary(
        0, nan, nan, feed.cursor().tokens_seen, found.url, feed.first_step, is_finished=True
    )


class _StepClock:
    """Seconds from step to step, without pauses."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begun


class _Run:
    """All that a start has to do with, ready to train."""

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        journal: Journal,
        facts: RunFacts,
        feed: Feed,
        group: TrainerGroup,
        log: MetricsLog,
        evaluator: Evaluator | None,
        stop: StopSignal,
        num_steps: int,
        checkpoint_url: str,
    ) -> None:
        self._config, self._console, self._journal, self._facts = config, console, journal, facts
        self._feed, self._group, self._log, self._evaluator = feed, group, log, evaluator
        self._stop, self._num_steps = stop, num_steps
        self._clock = _StepClock()
        self._saves = Saves(config, group, journal, checkpoint_url, self._after_save)
        self.next_step = feed.first_step

    def to_the_end(self, num_skipped: int) -> RunSummary:
        """Every step that is left, or those until SIGTERM.

        Args:
            num_skipped: steps that were skipped before.
        """
        config, feed = self._config, self._feed
        progress = ProgressLine(self._console, self._num_steps, feed.first_step)
        skips = SkippedSteps(
            config.run_dir, config.max_skipped_steps, feed.first_step, num_skipped, feed.locate
        )
        losses: list[float] = []
        try:
            self._stop.steps_begin()
            self._clock.lap()
            for step in range(feed.first_step, self._num_steps):
                result = self._group.call("train_step")[
                    -1
                ]  # the last rank is on the last pipeline stage
                report = feed.commit(step)
                if said := skips.count(step, result):
                    self._journal.say(said)
                standing = Standing(
                    feed.source_epochs(), feed.cursor().tokens_seen, skips.total, self._clock.lap()
                )
                metrics = step_metrics(self._facts, report, result, standing)
                done = self.next_step = step + 1
                is_last = done == self._num_steps
                is_stop = self._stop.requested and not is_last
                is_saved = (
                    is_last
                    or is_stop
                    or (config.save_interval > 0 and done % config.save_interval == 0)
                )
                eval_loss = None
                if (
                    self._evaluator
                    and not is_stop
                    and self._evaluator.is_due(done, is_last=is_last, is_saved=is_saved)
                ):
                    with self._clock.pause():
                        evaluated = self._evaluator.run(self._group, done)
                    eval_loss = float(evaluated["eval/loss"])
                    metrics.update(evaluated)
                self._log.write(metrics)
                progress.update(metrics)
                losses.append(result.loss)
                self._saves.poll()
                if is_saved:
                    with self._clock.pause():
                        self._save(done, skips.total, eval_loss, must=is_last or is_stop)
                if is_stop:
                    self._journal.say(f"SIGTERM: stopping after step {step}")
                    break
            self._saves.wait()
        except BaseException:
            self._stop.steps_end()
            raise
        finally:
            progress.stop()
        is_finished = self.next_step == self._num_steps
        if is_finished:
            _write_ledger(config, feed)
        self._journal.write(
            "finished" if is_finished else "stopped by SIGTERM; the same command goes on"
        )
        tokens_seen = feed.cursor().tokens_seen
        return RunSummary(
            len(losses),
            losses[0],
            losses[-1],
            tokens_seen,
            self._saves.last,
            self.next_step,
            is_finished=is_finished,
        )

    def _save(self, done: int, num_skipped: int, eval_loss: float | None, *, must: bool) -> None:
        """Begins a checkpoint. Weights, cursor, ledger and the position in the metrics are of this moment."""
        self._log.flush()
        extra = {
            "cursor": json.loads(self._feed.cursor().to_json()),
            "metrics_lines": self._log.num_lines,
            "skipped_steps": num_skipped,
            "eval_loss": eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        }
        self._saves.begin(done, extra, must=must)

    def _after_save(self, done: int) -> None:
        """Exports to Hugging Face's format where asked, and removes old checkpoints."""
        config = self._config
        with self._clock.pause():
            if config.save_hf and (done == self._num_steps or "{rollout_id}" in config.save_hf):
                saved = storage.join(config.save, folder_name(done))
                _export(
                    config, saved, config.save_hf.replace("{rollout_id}", str(done)), self._journal
                )
            for folder in checkpoint_folder.remove_old(
                config.save, config.keep_last, config.keep_best
            ):
                self._journal.write(f"removed  {folder}")
            self._journal.flush()


def _write_ledger(config: TrainConfig, feed: Feed) -> None:
    storage.write_text(
        storage.join(config.run_dir, run_folder.LEDGER), json.dumps(feed.ledger_summary(), indent=1)
    )
    feed.finish()


def _export(config: TrainConfig, saved: str, target: str, journal: Journal) -> None:
    journal.say(f"Hugging Face checkpoint  {megatron_to_hf(saved, config.hf_checkpoint, target)}")


def require_shared(save: str, group: TrainerGroup) -> None:
    """Refuses a local folder for checkpoints that a rank does not see: it would write into one of its own.

    Raises:
        CheckpointError: names the machines.
    """
    if not storage.is_local(save):
        return
    probe = storage.join(save, ".shared")
    storage.write_text(probe, "")
    try:
        blind = sorted({node for node, sees in group.call("sees", probe) if not sees})
    finally:
        fs, path = storage.filesystem(probe)
        fs.rm(path)
    if blind:
        raise CheckpointError(
            f"--save {save} is not the same folder on {', '.join(blind)}: give one that all nodes share, or a URL such "
            "as s3://bucket/run"
        )


def describe(config: TrainConfig) -> str:
    """The resolved configuration, as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1, default=str)


@contextlib.contextmanager
def ray_cluster(config: TrainConfig) -> Iterator[bool]:
    """The Ray that is running, the one asked for, or a small one of the run's own, which ends with the run.

    Yields:
        whether the trainers have a GPU each: where the cluster has any.

    Raises:
        NoRoomError: it cannot hold the trainers beside the loader.
    """
    num_cpus = None if torch.cuda.is_available() else config.data.stream.loader_cpus
    is_ours = local_ray.connect(
        num_cpus, config.cluster.object_store_bytes, config.cluster.ray_address
    )
    try:
        need = config.data.stream.loader_cpus
        have = ray.cluster_resources()
        if have.get("GPU", 0):
            need += config.cluster.world_size
            if have["GPU"] < config.cluster.world_size:
                raise NoRoomError(
                    f"{config.cluster.world_size} trainers need a GPU each; Ray has {have['GPU']:g}"
                )
        if have.get("CPU", 0) < need:
            raise NoRoomError(
                f"Ray has {have.get('CPU', 0):g} CPUs; the trainers and --loader-cpus "
                f"{config.data.stream.loader_cpus} need {need}"
            )
        yield have.get("GPU", 0) > 0
    finally:
        if is_ours:
            ray.shutdown()
