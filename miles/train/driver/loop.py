"""A run, in the driver: train a step, commit its rows, write its metrics, evaluate, save, stop.

train          opens what all attempts share; attempts follow each other until one ends the run
run_attempt    opens the data and starts the trainers
TrainingLoop   the steps
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from miles.common import output, patience, ray_health
from miles.common.counts import counted
from miles.common.prose import Prose
from miles.common.screen import Screen
from miles.data.types import StepReport
from miles.train.config import TrainConfig
from miles.train.driver.attempts import AttemptLog, with_restarts
from miles.train.driver.checkpoint_manager import CheckpointManager
from miles.train.driver.cluster import ray_cluster, settle_device
from miles.train.driver.ending import conclude_finished_run, write_ledger
from miles.train.driver.export import Exporter
from miles.train.driver.finished import LAST_STEP
from miles.train.driver.folder_leases import hold_folders
from miles.train.driver.metrics import Metrics, RunTotals, step_metrics
from miles.train.driver.old_checkpoints import OldCheckpoints
from miles.train.driver.opening import open_data, start_processes, start_trainers
from miles.train.driver.preemption import BETWEEN_STEPS, CTRL_C, Stopped, StopSignal
from miles.train.driver.progress import ProgressLine
from miles.train.driver.records import open_run_log
from miles.train.driver.resume_state import ResumeState
from miles.train.driver.run import Attempt, Run, RunSummary
from miles.train.driver.skipped_steps import SkippedSteps
from miles.train.driver.step_clock import StepClock
from miles.train.estimate.preflight import preflight
from miles.train.types import StartPoint, StepResult


def train(
    config: TrainConfig, console: Console | None = None, notices: Sequence[str] = ()
) -> RunSummary:
    """Train to the end of the data, or to `num_rollout` steps; resume from a checkpoint in `save`.

    If a rank, the feed or a stage of the stream is lost, all of them are started again from the
    last complete checkpoint, up to `max_restarts` times from the same one. On SIGTERM, SIGHUP and
    the first Ctrl-C, the step that is under way is finished and saved, and the call returns. Where
    nobody reads what is printed any more, the run goes on.

    Args:
        notices: sentences on the launch line, reported first.

    Raises:
        MilesError: a setting, file, checkpoint or cluster that cannot be used.
        KeyboardInterrupt: a second Ctrl-C, or one while no step was under way; its text says what
            is lost.
    """
    try:
        with output.outlived():
            return _train(config, console, notices)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or BETWEEN_STEPS) from None


def _train(config: TrainConfig, console: Console | None, notices: Sequence[str]) -> RunSummary:
    console = console or Screen(markup=False, emoji=False)
    found = preflight(config)
    start = found.require_start()

    def show(text: str) -> None:
        console.print(Prose(f"  {text}"), soft_wrap=True)

    def wait(text: str) -> None:
        if not patience.doing(text, is_long=True):
            show(text)

    with (
        hold_folders(config, console) as leases,
        ray_cluster(config, wait) as on_gpu,
        open_run_log(config.run_dir, console) as run_log,
        StopSignal(run_log.show) as stop_signal,
    ):
        for notice in (*notices, *found.notices, *found.fit.notices()):
            run_log.report(notice)
        try:
            if StartPoint.find(config) != start:  # another run wrote until the lease was ours
                found = preflight(config)
                start = found.require_start()
            config = settle_device(config, run_log, start, has_gpus=on_gpu)

            attempt_log = AttemptLog(config.run_dir, run_log.report)
            run = Run(config, console, run_log, attempt_log, stop_signal, on_gpu, found, leases)
            return with_restarts(config, start, run_log, attempt_log, partial(run_attempt, run))
        except Stopped:
            run_log.report(f"{stop_signal.name}: stopping before the first step")
            start = StartPoint.find(config)
            return RunSummary.of(
                [],
                tokens_seen=0,
                checkpoint=start.url,
                next_step=start.next_step,
                is_finished=False,
            )


def run_attempt(run: Run, start: StartPoint) -> RunSummary:
    """Train from a checkpoint to the end of the run, or until SIGTERM.

    Raises:
        LostError: a part of the run was lost; another attempt may go further.
        MilesError: what another attempt would not mend.
    """
    ray_health.require_node()  # an attempt may have ended because its Ray had
    with contextlib.ExitStack() as cleanup:
        is_finished = run.preflight.is_finished
        early_group = None if is_finished else start_processes(run, cleanup)
        patience.doing("opening the rows")
        data = open_data(run, start, cleanup)
        if data.is_finished:
            return conclude_finished_run(run, start, data)
        group = early_group or start_processes(run, cleanup)
        attempt = start_trainers(run, start, data, group, cleanup)
        return TrainingLoop(attempt).run()


class TrainingLoop:
    """The steps of an attempt."""

    def __init__(self, attempt: Attempt) -> None:
        run = attempt.run
        self._config = run.config
        self._run_log = run.run_log
        self._attempt_log = run.attempt_log
        self._stop_signal = run.stop_signal
        self._leases = run.leases
        self._constants = attempt.constants
        self._feed = attempt.data.feed
        self._schedule = attempt.data.schedule
        self._evaluator = attempt.data.evaluator
        self._group = attempt.group
        self._metrics_log = attempt.metrics_log
        frozen = attempt.start.frozen_weights(run.config)
        base_url = frozen.url if frozen else None

        self._next_step = self._feed.first_step
        self._newest_step = self._next_step
        """steps in the newest complete checkpoint"""
        self._losses: list[float] = []
        self._clock = StepClock()
        self._skipped_steps = SkippedSteps(
            self._config.run_dir,
            self._config.max_skipped_steps,
            self._next_step,
            attempt.data.state.num_skipped_steps,
            self._feed.locate,
            self._run_log.report,
        )
        self._checkpoints = CheckpointManager(
            self._config, self._group, self._run_log, attempt.start.url, self._on_checkpoint
        )
        self._old_checkpoints = OldCheckpoints(self._config, self._run_log, base_url)
        self._exporter = Exporter(
            self._config, run.shape, self._group, self._run_log, self._schedule.num_steps, frozen
        )
        self._progress = ProgressLine(run.console, self._schedule.num_steps, self._next_step)

    def run(self) -> RunSummary:
        """Train the steps that are left, or those until SIGTERM; enter the end in starts.jsonl.

        Raises:
            MilesError: what ended the attempt.
        """
        try:
            summary = self._run()
        except KeyboardInterrupt:
            how = self._interruption()
            self._attempt_log.end(how, self._next_step)
            raise KeyboardInterrupt(how) from None
        except Stopped:
            self._attempt_log.end(f"{self._stop_signal.name}, before a step", self._next_step)
            raise
        except BaseException as error:
            self._attempt_log.fail(error, self._next_step, has_begun=True)
            raise
        how = LAST_STEP if summary.is_finished else self._stop_signal.name
        self._attempt_log.end(how, summary.next_step)
        return summary

    def _run(self) -> RunSummary:
        try:
            self._stop_signal.begin_steps()
            self._clock.lap()
            self._train_steps()
            self._checkpoints.wait()
        except BaseException:
            self._stop_signal.end_steps()
            raise
        finally:
            self._exporter.abandon()
            self._progress.stop()
            self._skipped_steps.close()

        is_finished = self._next_step == self._schedule.num_steps
        if is_finished:
            write_ledger(self._config, self._feed, self._run_log)
        stopped = f"stopped by {self._stop_signal.name}; the same command goes on"
        self._run_log.write("finished" if is_finished else stopped)
        return RunSummary.of(
            self._losses,
            tokens_seen=self._feed.cursor().tokens_seen,
            checkpoint=self._checkpoints.newest,
            next_step=self._next_step,
            is_finished=is_finished,
            stopped_by=None if is_finished else self._stop_signal.name,
        )

    def _interruption(self) -> str:
        """Return what a second Ctrl-C has cost."""
        num_lost = self._next_step - self._newest_step
        return (
            f"Ctrl-C: stopped at once; {counted(num_lost, 'step')} since {self._checkpoints.newest} "
            f"{'is' if num_lost == 1 else 'are'} lost. The same command goes on from there"
        )

    def _train_steps(self) -> None:
        for step in range(self._next_step, self._schedule.num_steps):
            self._stop_signal.step = step
            result = self._group.train_step()
            self._leases.require_not_taken()
            report = self._feed.commit(step)
            metrics = self._measure(report, result)
            num_done = self._next_step = step + 1
            actions = self._schedule.after(num_done, stop_requested=self._stop_signal.is_requested)

            eval_loss = self._evaluate(num_done, metrics) if actions.evaluates else None
            self._metrics_log.write(metrics)
            self._progress.update(metrics)
            self._losses.append(result.loss)

            ray_health.require_whole()
            self._checkpoints.poll()
            if actions.saves:
                self._save(num_done, eval_loss, must_succeed=actions.must_save)
            if actions.is_stop:
                # After Ctrl-C, the terminal has said so at once.
                is_said = self._stop_signal.name == CTRL_C
                tell = self._run_log.write if is_said else self._run_log.report
                tell(f"{self._stop_signal.name}: stopping after step {step}")
                return

    def _measure(self, report: StepReport, result: StepResult) -> Metrics:
        """Return the metrics of a step; report it if it was skipped.

        Raises:
            DivergedError: too many consecutive steps were skipped.
        """
        sentence = self._skipped_steps.record(report.position.index, result)
        if sentence is not None:
            self._run_log.report(sentence)

        totals = RunTotals(
            self._feed.source_epochs(),
            self._feed.cursor().tokens_seen,
            self._skipped_steps.num_skipped,
        )
        return step_metrics(self._constants, report, result, totals, self._clock.lap())

    def _evaluate(self, num_done: int, metrics: Metrics) -> float:
        """Evaluate, and add the result to the metrics of the step; return the loss."""
        assert self._evaluator is not None, "the schedule evaluates only where there are rows"
        with self._clock.pause():
            eval_metrics = self._evaluator.run(self._group, num_done)
        metrics.update(eval_metrics)
        return float(eval_metrics["eval/loss"])

    def _save(self, num_done: int, eval_loss: float | None, *, must_succeed: bool) -> None:
        """Begin a checkpoint, and write its export, if it has one.

        Weights, cursor and position in the metrics are of this moment.
        """
        with self._clock.pause():
            self._checkpoints.wait()  # the one before may still have an export to finish
            self._metrics_log.flush()
            self._skipped_steps.flush()
            self._feed.flush()

            state = ResumeState(
                self._feed.cursor(),
                self._metrics_log.num_lines,
                self._skipped_steps.num_skipped,
                eval_loss,
                self._config.data.encode.chat_template,
                self._config.precision,
                tuple(self._metrics_log.unwritten),
            )

            self._exporter.abandon()  # that of a checkpoint that failed takes no room here
            content = state.to_json()
            if self._checkpoints.begin(num_done, content, must_succeed=must_succeed):
                self._exporter.begin(num_done)

    def _on_checkpoint(self, iteration: int) -> None:
        """Export a checkpoint that has become complete, and remove old ones."""
        self._newest_step = iteration
        with self._clock.pause():
            self._attempt_log.note_checkpoint(iteration)
            self._exporter.finish(self._checkpoints.newest, iteration)
            self._old_checkpoints.remove()
            self._run_log.flush()
