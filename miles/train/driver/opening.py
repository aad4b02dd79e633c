"""Opening an attempt: first its data, then, if a step is left, its trainers.

start_processes  the trainer actors, which import torch and Megatron while the data are opened
open_data        the evaluation set, the feed at the checkpoint's cursor, the schedule
start_trainers   the logs, the checkpoint in the trainers, the entry in starts.jsonl
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

from miles.architecture.adapter import described
from miles.architecture.sizes import total_parameters
from miles.common import checkpoint_folder, own_files, patience, run_folder, storage
from miles.common.counts import counted
from miles.data.stream.feed import Feed
from miles.train.driver.cluster import require_shared_folder
from miles.train.driver.evaluator import Evaluator
from miles.train.driver.export import remove_unfinished
from miles.train.driver.group import TrainerGroup
from miles.train.driver.metrics import RunConstants
from miles.train.driver.metrics_log import MetricsLog, Sink
from miles.train.driver.resolved_settings import describe
from miles.train.driver.resume_state import ResumeState
from miles.train.driver.run import Attempt, AttemptData, Run
from miles.train.driver.schedule import Schedule
from miles.train.driver.sinks import open_sinks
from miles.train.driver.surroundings import surroundings
from miles.train.precision import Precision
from miles.train.run_length import run_length
from miles.train.types import RankSetup, StartPoint


def start_processes(run: Run, cleanup: ExitStack) -> TrainerGroup:
    """Start the trainers' processes; `cleanup` ends them.

    Raises:
        NoRoomError: the cluster has no place for them.
    """
    group = TrainerGroup(run.config.cluster, on_gpu=run.on_gpu)
    cleanup.callback(group.shut_down)
    return group


def open_data(run: Run, start: StartPoint, cleanup: ExitStack) -> AttemptData:
    """Open the data of an attempt; `cleanup` closes it.

    Raises:
        MilesError: rows, a tokenizer or a cursor that cannot be used.
    """
    config = run.config
    state = ResumeState.of(start)
    evaluator = Evaluator.open(config, run.run_log, run.preflight.eval_survey)
    if evaluator is not None:
        cleanup.callback(evaluator.close)

    feed = Feed.open(
        config.streamed_data,
        cursor=state.cursor,
        cursor_path=start.url,
        num_ranks=config.cluster.world_size,
        run_dir=config.run_dir,
        stream=run.preflight.survey.stream,
    )
    feed.report = run.run_log.report
    cleanup.callback(feed.close)

    schedule = Schedule.of(config, feed.info.num_steps, has_eval_set=evaluator is not None)
    return AttemptData(state, evaluator, feed, schedule)


def start_trainers(
    run: Run, start: StartPoint, data: AttemptData, group: TrainerGroup, cleanup: ExitStack
) -> Attempt:
    """Open the logs and have the trainers of an attempt load its checkpoint.

    `cleanup` closes the logs, and ends the trainers before the feed that they read from.

    Raises:
        MilesError: a sink, a cluster or a checkpoint that cannot be used.
    """
    config = run.config
    for name in checkpoint_folder.remove_unfinished(config.save):
        run.run_log.write(f"removed  {name}, a checkpoint that was never complete")
    for folder in remove_unfinished(config):
        run.run_log.write(f"removed  {folder}, an export that was never complete")
    own_files.write_if_new(storage.join(config.run_dir, run_folder.CONFIG), describe(config))
    settings = dataclasses.asdict(config)
    first_step = data.feed.first_step
    is_begun = first_step > 0 or run.attempt_log.is_restarting
    sinks = open_sinks(config.logging, config.run_dir, first_step, settings, must_open=not is_begun)
    metrics_log = cleanup.enter_context(open_metrics(run, data, sinks))

    cleanup.callback(group.shut_down)
    setup = RankSetup.of(
        config,
        run.shape,
        start,
        num_steps=data.schedule.num_steps,
        num_sources=len(data.feed.info.source_names),
    )
    num_trainers = config.cluster.world_size
    load = "loads" if num_trainers == 1 else "load"
    starting = f"starting {counted(num_trainers, 'trainer')}, which {load} {start.origin}"
    if not patience.doing(starting, is_long=True):
        run.run_log.show(starting)
    gpu_name = group.setup(setup)
    require_shared_folder(config.save, group)
    group.attach_feed(data.feed.handle, data.feed.first_step, data.schedule.num_steps)

    _report_start(run, start, data, gpu_name)
    constants = RunConstants(
        data.feed.info.source_names,
        run.shape,
        config.cluster.world_size,
        gpu_name if config.precision is Precision.BF16 else None,
        config.lora.adapter(run.shape),
    )
    return Attempt(run, start, data, group, metrics_log, constants)


def open_metrics(run: Run, data: AttemptData, sinks: Sequence[Sink] = ()) -> MetricsLog:
    """Open metrics.jsonl where the checkpoint of an attempt stands."""
    return MetricsLog(
        run.config.run_dir,
        data.state.num_metrics_lines,
        sinks,
        unwritten=data.state.unwritten_metrics,
        first_step=data.feed.first_step,
        report=run.run_log.report,
    )


def _report_start(run: Run, start: StartPoint, data: AttemptData, gpu_name: str | None) -> None:
    """Enter the attempt in starts.jsonl, and report it."""
    config = run.config
    info = data.feed.info
    first_step = data.feed.first_step
    assert config.precision is not None, "the ranks' device is known"
    layout = config.cluster.layout
    reason = run.attempt_log.begin(
        first_step, start.url, layout, config.precision, surroundings(run.shape, gpu_name)
    )
    if config.num_rollout is not None:
        length = run_length(config, info.steps_per_epoch, info.num_steps)
        run.run_log.report(f"{counted(data.schedule.num_steps, 'step')}: {length}")

    adapter = config.lora.adapter(run.shape)
    if adapter is not None:
        run.run_log.report(f"LoRA: {described(run.shape, adapter, total_parameters(run.shape))}")

    origin = f"from {start.url if start.adapter_path is None else start.origin}"
    if start.is_resume:
        origin = f"going on at step {first_step} from {start.url} ({reason})"
    run.run_log.report(
        f"{counted(info.num_rows, 'row')} in {counted(len(info.source_names), 'source')}, "
        f"{counted(data.schedule.num_steps, 'step')} of "
        f"{counted(config.data.order.batch_size, 'row')}; "
        f"{counted(config.cluster.world_size, 'trainer')}, {origin}"
    )
