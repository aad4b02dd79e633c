"""Everything that can be known of a run before it is started: for `train` and `--dry-run` alike.

    settings, places, tokenizer, checkpoint     each is looked at, and all mistakes are reported
    rows, steps, position, sample, evaluation   the first mistake is reported
    memory of a GPU, room for a checkpoint      an estimate: it is reported, and forbids no run

It needs no Ray and no GPU, and writes nothing. What it has read is handed on (`Preflight`), so that
a run reads nothing twice. A check is a function that raises a `MilesError`; a new one is called
here, and then holds for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from miles.architecture.adapter import AdapterShape
from miles.architecture.config import ModelShape
from miles.architecture.families import read_shape
from miles.common import patience, storage
from miles.common.first_contact import first_contact
from miles.common.mistakes import Mistakes
from miles.common.ray_address_form import require_address
from miles.common.run_record import missing_lines_notice, require_own_run_folder
from miles.convert.expected_tensors import require_weights
from miles.data.config import DataConfig
from miles.data.stream.counted_stream import CountedStream
from miles.data.stream.eval_rows import eval_config
from miles.data.stream.reject_limits import RejectLimits
from miles.data.stream.survey import EvalSurvey, Sample, Survey, survey, survey_eval
from miles.data.stream.token_ids import require_ids_fit
from miles.data.types import Cursor
from miles.errors import CheckpointError
from miles.train.config import TrainConfig
from miles.train.estimate.adapter_checks import require_own_adapter, require_same_training
from miles.train.estimate.gpu_fit import GpuFit, seen_gpu_gib
from miles.train.estimate.memory import StageMemory, Training, estimate
from miles.train.estimate.place_checks import (
    places,
    require_exportable,
    require_place,
    require_sinks,
    room_notice,
)
from miles.train.launch.notices import LOOKING
from miles.train.optimizer_settings import check_schedule
from miles.train.precision import Precision
from miles.train.run_length import run_steps
from miles.train.types import StartPoint


@dataclass(frozen=True)
class Preflight:
    """A run as far as it is known before anything is started."""

    shape: ModelShape
    start: StartPoint | None
    """None, in a dry run alone: there are no weights to begin with, and `missing_start` says so"""
    missing_start: CheckpointError | None
    survey: Survey
    eval_survey: EvalSurvey | None
    """None: the rows to evaluate on are held-out ones, or there are none"""
    cursor: Cursor
    """where the run begins in its data"""
    num_steps: int
    memory: tuple[StageMemory, ...]
    fit: GpuFit
    notices: tuple[str, ...]
    """sentences on what may be a mistake"""

    @property
    def first_step(self) -> int:
        """Return the step that comes next."""
        return self.survey.stream.plan.step_at(self.cursor.consumed_rows)

    @property
    def is_finished(self) -> bool:
        """Return whether no step is left to train."""
        return self.first_step >= self.num_steps

    def require_start(self) -> StartPoint:
        """Return the checkpoint to begin from.

        Raises:
            CheckpointError: there is none.
        """
        if self.missing_start is not None:
            raise self.missing_start
        assert self.start is not None, "one of them is there"
        return self.start


def preflight(config: TrainConfig, *, is_dry_run: bool = False) -> Preflight:
    """Look at everything that can be known of a run before it is started.

    Args:
        is_dry_run: go on where only the checkpoint is missing; `require_start` raises it then.

    Raises:
        MilesError: the run could not start. Of several mistakes in the settings, places, tokenizer
            and checkpoint, it names all; its class is that of the first.
    """
    with first_contact(), patience.until_answered(LOOKING):
        try:
            return _look_at_all(config, is_dry_run=is_dry_run)
        finally:
            patience.answered()


def _look_at_all(config: TrainConfig, *, is_dry_run: bool) -> Preflight:
    """Look at the settings and places, then at the data."""
    mistakes = Mistakes(", and nothing was started")
    patience.doing("trying the places to write into")
    shape = mistakes.of(partial(_shape, config))
    for flag, url in places(config):
        mistakes.of(partial(require_place, flag, url))
    mistakes.of(partial(require_address, config.cluster.ray_address))
    mistakes.of(partial(require_own_run_folder, config.save, config.run_dir))
    mistakes.of(partial(require_sinks, config.logging, config.run_dir))
    mistakes.of(partial(require_exportable, config))
    if shape is not None:
        patience.doing("certifying the tokenizer")
        mistakes.of(
            partial(require_ids_fit, config.data.encode, shape.vocab_size, config.hf_checkpoint)
        )

    patience.doing("looking at the checkpoint to begin from")
    missing_start = None
    start = None
    try:
        start = StartPoint.find(config)
    except CheckpointError as error:
        missing_start = error
    if start is not None and not start.is_resume and shape is not None:
        mistakes.of(partial(require_own_adapter, config, shape))
    if start is not None and shape is not None:
        mistakes.of(partial(require_same_training, config, shape, start))
        mistakes.of(partial(_require_same_model, start, shape))
    if missing_start is not None and (mistakes.found or not is_dry_run):
        mistakes.found.append(missing_start)
    mistakes.raise_all()
    assert shape is not None, "its mistake was raised"

    return _look_at_data(config, shape, start, missing_start)


def _look_at_data(
    config: TrainConfig,
    shape: ModelShape,
    start: StartPoint | None,
    missing_start: CheckpointError | None,
) -> Preflight:
    """Count the rows and plan the steps, judge a sample, and estimate the memory."""
    data = config.streamed_data
    names = ", ".join(source.name for source in data.sources)
    patience.doing(f"counting the rows of {names}")
    stream = CountedStream.count(data)
    num_steps = run_steps(config, stream.plan.num_steps)
    check_schedule(config.optimizer, num_steps)
    cursor = stream.beginning
    if start is not None:
        cursor = stream.cursor_from(start.cursor(), start.url)

    patience.doing("encoding a sample of the rows")
    surveyed = survey(data, stream, num_steps)
    eval_surveyed = None
    if config.evaluation.sources:
        patience.doing("counting the rows of --eval-prompt-data, and encoding a sample")
        eval_surveyed = survey_eval(eval_config(config.data, config.evaluation.sources))

    continued = start.continued(config) if start is not None else config
    memory = run_memory(continued, shape, config.lora.adapter(shape))
    notices = (
        room_notice(continued, shape),
        _ranks_notice(data, stream),
        _share_notice(surveyed.sample, data),
        _lines_notice(config, start),
    )
    return Preflight(
        shape,
        start,
        missing_start,
        surveyed,
        eval_surveyed,
        cursor,
        num_steps,
        memory,
        GpuFit.of(config, memory, seen_gpu_gib()),
        tuple(notice for notice in notices if notice is not None),
    )


def _shape(config: TrainConfig) -> ModelShape:
    """Return the model's shape, which fits the layout and the settings."""
    shape = read_shape(config.hf_checkpoint)
    config.cluster.layout.require_fits(shape)
    config.optimizer.require_fits(shape)
    config.lora.adapter(shape)
    return shape


def _require_same_model(start: StartPoint, shape: ModelShape) -> None:
    """Refuse weights of another model, by the headers of their files."""
    for checkpoint in filter(None, (start.checkpoint, start.base)):
        if not checkpoint.is_hugging_face:
            continue
        require_weights(checkpoint.url, shape)


def run_memory(
    config: TrainConfig, shape: ModelShape, adapter: AdapterShape | None
) -> tuple[StageMemory, ...]:
    """Return the memory of a rank of each pipeline stage.

    Args:
        adapter: that alone is trained; None: all weights are.
    """
    return estimate(
        shape,
        config.cluster.layout,
        Training(
            precision=config.precision or Precision.BF16,
            recompute=config.recompute,
            optimizer=config.optimizer,
            compute=config.compute,
            adapter=adapter,
        ),
        max_tokens_per_gpu=config.data.pack.max_tokens_per_gpu,
    )


def _ranks_notice(data: DataConfig, stream: CountedStream) -> str | None:
    """Return a sentence if a step has fewer rows than there are data-parallel ranks."""
    num_rows = min(data.order.batch_size, stream.info.num_rows)
    num_idle = data.pack.dp_size - num_rows
    if num_idle <= 0:
        return None
    return (
        f"a step has {num_rows} rows for {data.pack.dp_size} data-parallel ranks: {num_idle} of "
        "them have nothing to train on; raise --rollout-batch-size, or take fewer GPUs"
    )


def _lines_notice(config: TrainConfig, start: StartPoint | None) -> str | None:
    """Return a sentence if the metrics of the run that goes on are not all there."""
    if start is None or not start.is_resume or not storage.is_within(start.url, config.save):
        return None
    extra = start.checkpoint.extra or {}
    num_lines = extra.get("metrics_lines", 0) - len(extra.get("unwritten_metrics", ()))
    return missing_lines_notice(config.run_dir, num_lines)


def _share_notice(sample: Sample, data: DataConfig) -> str | None:
    """Return a sentence if more of the sample's rows are dropped than a run bears of all rows."""
    num_rows = sample.num_rows - sample.num_held_out
    num_rejects = len(sample.rejects)
    if not RejectLimits.of(data).is_share_exceeded(num_rejects, num_rows):
        return None
    reasons = [f"{count} {reason}" for reason, count in sample.reasons.most_common()]
    return (
        f"{num_rejects} of {num_rows} sampled rows are dropped: {', '.join(reasons)}; a larger "
        f"share of all rows than {data.max_bad_fraction} (--max-bad-fraction) ends the run"
    )
