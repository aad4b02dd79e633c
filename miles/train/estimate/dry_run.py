"""`miles train … --dry-run`: everything that can be known of a run without starting it.

flags -> model · data · tokenizer · tokens · ranks on nodes · memory of each GPU · checkpoints

It needs no GPU, no Ray and no weights; of Hugging Face weights that are there, the headers are
compared with the model. Rows and steps are counted. Tokens are those of a sample, which the text
states. Memory is an estimate; docs/memory.md says which numbers are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.architecture.config import ModelShape
from miles.architecture.families import read_shape
from miles.architecture.sizes import active_parameters, padded_vocab_size, total_parameters
from miles.common import storage
from miles.data.stream.survey import Survey, count_rows, packed_step, survey
from miles.data.stream.token_ids import require_ids_fit
from miles.errors import CheckpointError
from miles.train.config import TrainConfig
from miles.train.estimate.memory import StageMemory, estimate
from miles.train.optimizer_settings import check_schedule
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.run_length import run_length, run_steps
from miles.train.types import StartPoint

CARDS_GIB = (24, 40, 48, 80, 141, 192)
"""Memory of common GPUs."""
SPARE = 0.1
"""Share of a card that is left to CUDA, NCCL and fragmentation."""
LARGE_CARD_GIB = 80
"""If a run needs more than this, the text says what would lower its need."""
SHOWN_NODES = 8

_PRECISIONS = {
    None: "bfloat16 on GPUs, optimized in float32; on a CPU float32",
    Precision.BF16: "bfloat16, optimized in float32",
    Precision.FP16: "float16, optimized in float32",
    Precision.FP32: "float32 (--bf16: bfloat16, half as much)",
}

Fact = tuple[str, str | Text]
"""A label and its text. Plain text is printed as it is: `[v2]` may be the name of a source."""


def dry_run(config: TrainConfig, console: Console, notices: Sequence[str] = ()) -> None:
    """Print the facts and the estimates of a run.

    Args:
        notices: sentences on the launch line, printed first.

    Raises:
        MilesError: the run could not start, for another reason than a missing checkpoint.
    """
    shape = read_shape(config.hf_checkpoint)
    start = _usable_start(config, shape)
    if start is not None:
        config = start.continued(config)
    layout = config.cluster.layout
    memory = estimate(
        shape,
        layout,
        precision=config.precision or Precision.BF16,
        max_tokens_per_gpu=config.data.pack.max_tokens_per_gpu,
        recompute=config.recompute,
        optimizer=config.optimizer,
        compute=config.compute,
    )
    require_ids_fit(config.data.encode, shape.vocab_size, config.hf_checkpoint)
    surveyed = survey(config.streamed_data)
    num_steps = run_steps(config, surveyed.plan.num_steps)
    check_schedule(config.optimizer, num_steps)

    console.print(Text.assemble(("Dry run", "bold"), ": nothing is trained or written\n"))
    for notice in notices:
        console.print(f"  {notice}", soft_wrap=True, highlight=False, markup=False, emoji=False)
    if notices:
        console.print()
    _section(console, "Model", _model(config, shape))
    data = [*_data(surveyed), *_steps(config, surveyed, num_steps), *_evaluation(config)]
    _section(console, "Data", data)
    _section(console, "Tokenizer", _tokenizer(surveyed))
    _section(console, "Tokens", _tokens(config, surveyed, layout))
    _section(console, "Ranks", _ranks(config, shape, layout))
    console.print(
        Text.assemble(("Memory of a GPU", "bold"), ", in GiB: an estimate (docs/memory.md)")
    )
    console.print(_memory_table(memory))
    for line in (*_verdict(config, memory), *_of_machine(config, memory)):
        console.print(f"  {line}", highlight=False, markup=False)
    console.print()
    _section(console, "Checkpoints", _checkpoints(config))


def _usable_start(config: TrainConfig, shape: ModelShape) -> StartPoint | None:
    """Return the checkpoint to begin from; None where there is none yet, which is no error here.

    Raises:
        CheckpointError: names the tensor that the model cannot take.
    """
    try:
        start = StartPoint.find(config)
    except CheckpointError:
        return None
    if start.checkpoint.is_hugging_face:
        # torch is imported only where there are tensors to look at.
        from miles.convert.hf_boxes import require_weights

        require_weights(start.url, shape)
    return start


def _section(console: Console, title: str, facts: Iterable[Fact]) -> None:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2),
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts:
        table.add_row(Text(label), text if isinstance(text, Text) else Text(text))

    console.print(table)
    console.print()


def _model(config: TrainConfig, shape: ModelShape) -> Iterator[Fact]:
    total = total_parameters(shape)
    active = active_parameters(shape)
    yield "checkpoint", config.hf_checkpoint
    yield "family", f"{shape.model_type}, {shape.num_layers} layers of {shape.hidden_size}"

    of_token = f", {active / 1e9:.2f} billion of them for a token" if active != total else ""
    yield "parameters", f"{total:,} ({total / 1e9:.2f} billion{of_token})"

    precision = _PRECISIONS[config.precision]
    if config.precision is None and config.optimizer.cpu_offload:
        precision += ", which --optimizer-cpu-offload refuses: it needs --bf16 there"
    yield "precision", precision


def _data(surveyed: Survey) -> Iterator[Fact]:
    for source in surveyed.manifest.sources:
        files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
        rows = f"{source.num_rows:,} rows in {files}"
        yield source.name, f"{rows}, {source.format.shape} ({source.files[0].path})"


def _steps(config: TrainConfig, surveyed: Survey, num_steps: int) -> Iterator[Fact]:
    order = config.data.order
    plan = surveyed.plan
    shuffle = "in file order (--rollout-shuffle shuffles)"
    if order.shuffle:
        shuffle = f"shuffled by seed {order.seed}"
    yield "order", f"{shuffle}, {order.batch_size} rows a step"

    yield "steps", f"{num_steps:,}: {run_length(config, plan.steps_per_epoch, plan.num_steps)}"

    optimizer = config.optimizer
    decay = f"{optimizer.lr_decay_style} to {optimizer.min_lr:g}"
    yield "rate", f"{optimizer.lr:g} after {optimizer.warmup_steps(num_steps)} steps, {decay}"


def _evaluation(config: TrainConfig) -> Iterator[Fact]:
    evaluation = config.evaluation
    when = "at the end"
    if evaluation.interval:
        when = f"every {evaluation.interval} steps and at the end"

    if evaluation.sources:
        names = ", ".join(source.name for source in evaluation.sources)
        yield "evaluation", f"{count_rows(evaluation.sources):,} rows of {names}, {when}"
    elif config.data.held_out_fraction:
        share = f"{config.data.held_out_fraction:.1%} of the rows"
        yield "evaluation", f"{share}, not trained on, {when}"


def _tokenizer(surveyed: Survey) -> Iterator[Fact]:
    for name in ("ids", "terminator", "fingerprint"):
        yield name, surveyed.certificate[name]


def _tokens(config: TrainConfig, surveyed: Survey, layout: Layout) -> Iterator[Fact]:
    sample = surveyed.sample
    lengths = sample.lengths
    rows = f"{sample.num_rows:,} of {surveyed.plan.num_rows:,} rows"
    yield "sample", f"{rows}; the numbers below are estimated from them"

    reasons = [f"{count} {reason}" for reason, count in sample.reasons.most_common()]
    yield "dropped", ", ".join(reasons) or "none"

    percentiles = [f"{int(length):,}" for length in np.percentile(lengths, [50, 95, 100])]
    within = f"half / 95 % / all of the rows are within {' / '.join(percentiles)}"
    yield "lengths", f"{lengths.mean():,.0f} tokens on average; {within}"
    yield "trained", f"{sample.num_trained_tokens / lengths.sum():.0%} of the tokens"

    # A row gives a sample if it is usable and not held out.
    trained_share = len(lengths) / sample.num_rows * (1 - config.data.held_out_fraction)
    epoch_tokens = lengths.mean() * trained_share * surveyed.plan.rows_per_epoch
    yield "an epoch", f"about {epoch_tokens:,.0f} tokens"

    step_samples = max(round(config.data.order.batch_size * trained_share), 1)
    pack = config.data.pack
    tokens, num_micro_batches, fill = packed_step(lengths, step_samples, pack)
    batches = f"{num_micro_batches} micro-batch(es) of {pack.capacity_tokens:,}"
    ranks = f"on each of {layout.data} data-parallel rank(s)"
    yield "a step", f"about {tokens:,} tokens: {batches} {ranks}, {fill:.0%} full"


def _ranks(config: TrainConfig, shape: ModelShape, layout: Layout) -> Iterator[Fact]:
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    if layout.sequence_parallel:
        sizes += " with sequence parallelism"
    if layout.expert > 1:
        sizes += f"; experts over {layout.expert}, each split in {layout.expert_tensor}"
    yield "layout", f"{layout.world_size} rank(s): {sizes}"

    num_rows = padded_vocab_size(shape, layout.tensor)
    if num_rows != shape.vocab_size:
        padded = f"padded to {num_rows:,} rows, which {layout.tensor} tensor-parallel ranks divide"
        yield "vocabulary", f"{shape.vocab_size:,} tokens, {padded}"

    num_nodes = config.cluster.num_nodes
    per_node = config.cluster.gpus_per_node
    for node in range(min(num_nodes, SHOWN_NODES)):
        ranks = range(node * per_node, (node + 1) * per_node)
        stages = _span(rank // (layout.tensor * layout.data) for rank in ranks)
        replicas = _span(layout.data_rank(rank) for rank in ranks)
        place = f"pipeline stage {stages}, data rank {replicas}"
        yield f"node {node}", f"ranks {ranks[0]}-{ranks[-1]}: {place}"
    if num_nodes > SHOWN_NODES:
        yield "", f"and {num_nodes - SHOWN_NODES} nodes more"

    if per_node % layout.tensor:
        yield (
            "warning",
            f"the {layout.tensor} tensor-parallel ranks of a replica do not lie on one node of "
            f"{per_node}: each layer would wait for the network. Choose a size that divides "
            "--actor-num-gpus-per-node",
        )


def _span(numbers: Iterable[int]) -> str:
    """Return the first and the last of some numbers: `2-3`, or `2` where they are one."""
    distinct = sorted(set(numbers))
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]}-{distinct[-1]}"


def _memory_table(memory: Sequence[StageMemory]) -> Table:
    """Return the table, within 80 columns; of many pipeline stages the first and last two."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    titles = ("stage", "layers", "parameters", "weights", "grads", "optimizer", "activ.", "loss")
    for title in (*titles, "total"):
        table.add_column(title, justify="right", header_style="dim", no_wrap=True)

    shown = memory if len(memory) <= 4 else (*memory[:2], *memory[-2:])
    for stage in shown:
        sizes = (
            stage.weights,
            stage.gradients,
            stage.optimizer,
            stage.activations,
            stage.loss,
            stage.total,
        )
        gib = [f"{size / 2**30:.2f}" for size in sizes]
        table.add_row(str(stage.stage), str(stage.num_layers), f"{stage.num_parameters:,}", *gib)
    return table


def _verdict(config: TrainConfig, memory: Sequence[StageMemory]) -> Iterator[str]:
    """Say on which GPUs the fullest stage fits, and what would lower its need."""
    fullest = max(memory, key=lambda stage: stage.total)
    need_gib = fullest.total / 2**30 / (1 - SPARE)
    spare = f"(with {SPARE:.0%} to spare)"
    fitting = [card for card in CARDS_GIB if card >= need_gib]
    if fitting:
        yield f"fits on GPUs of {fitting[0]} GiB or more {spare}"
    else:
        yield f"fits on no GPU of {CARDS_GIB[-1]} GiB or less {spare}"
    if need_gib <= LARGE_CARD_GIB:
        return

    of_micro_batch = fullest.activations + fullest.loss
    if of_micro_batch > fullest.total - of_micro_batch:
        remedy = "--max-tokens-per-gpu lower"
        if config.recompute.granularity != "full":
            remedy += ", or --recompute-granularity full"
        yield f"most of it are activations and the loss: {remedy} helps"
    else:
        remedy = "more GPUs, or tensor, pipeline or expert parallelism help"
        if not config.optimizer.cpu_offload:
            remedy += ", or --optimizer-cpu-offload"
        yield f"most of it are weights and their state: {remedy}"


def _of_machine(config: TrainConfig, memory: Sequence[StageMemory]) -> Iterator[str]:
    """Say what offloaded optimizer state takes of a machine's own memory."""
    largest = max(stage.host for stage in memory)
    if largest:
        num_ranks = config.cluster.gpus_per_node
        gib = largest / 2**30
        yield (
            f"{gib * num_ranks:,.2f} GiB of the memory of a machine are the optimizer's: "
            f"{gib:,.2f} for each of {num_ranks} rank(s) on it (--optimizer-cpu-offload)"
        )


def _checkpoints(config: TrainConfig) -> Iterator[Fact]:
    try:
        yield "start", _start(StartPoint.find(config))
    except CheckpointError as error:
        yield "start", Text.assemble(("missing", "red"), f": {error}")

    every = "at the end"
    if config.save_interval:
        every = f"every {config.save_interval} steps and at the end"
    where = "" if storage.is_local(config.save) else ", on object storage"
    yield "save", f"{config.save}, {every}{where}"

    if config.keep_last or config.keep_best:
        yield "kept", f"the newest {config.keep_last or 1}, the best {config.keep_best or 0}"
    if config.save_hf:
        yield "export", config.save_hf
    yield "run's folder", config.run_dir


def _start(start: StartPoint) -> str:
    if start.checkpoint.is_hugging_face:
        return f"{start.url}, each rank reads its own part"
    if not start.is_resume:
        return start.url
    extra = start.checkpoint.extra or {}
    return f"{start.url}, resuming after {extra['cursor']['consumed_rows']:,} rows"
