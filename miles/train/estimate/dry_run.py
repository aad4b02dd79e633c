"""`miles train … --dry-run`: all that can be known of a run without starting it. Needs no GPU, no
Ray, no weights.

    flags -> model · data · tokenizer · tokens of a sample · steps · ranks on nodes · memory on each
    GPU · checkpoints

Rows and steps are counted; tokens are those of a sample, and said to be; of memory, docs/memory.md
says what is what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from miles.architecture.config import ModelShape
from miles.architecture.families import read_shape
from miles.architecture.sizes import active_parameters, total_parameters
from miles.common import storage
from miles.data.stream.survey import Survey, count_rows, packed_step, survey
from miles.errors import CheckpointError
from miles.train.config import TrainConfig, check_schedule
from miles.train.estimate.memory import StageMemory, estimate
from miles.train.parallel_layout import Layout
from miles.train.types import StartPoint

CARDS_GIB = (24, 40, 48, 80, 141, 192)
"""Memory of common GPUs."""
SPARE = 0.1
"""Share of a card that is left to CUDA, NCCL and fragmentation."""
SHOWN_NODES = 8

Fact = tuple[str, str]
"""A label and what is to be said."""


def dry_run(config: TrainConfig, console: Console) -> None:
    """Prints what the run would be.

    Raises:
        MilesError: what would keep the run from starting, but a checkpoint to start from.
    """
    shape = read_shape(config.hf_checkpoint)
    layout = config.cluster.layout
    memory = estimate(
        shape,
        layout,
        bf16=config.bf16,
        max_tokens_per_gpu=config.data.pack.max_tokens_per_gpu,
        recompute=config.recompute,
    )
    found = survey(config.data)
    num_steps = min(found.plan.num_steps, config.num_rollout or found.plan.num_steps)
    check_schedule(config.optimizer, num_steps)

    console.print("[bold]Dry run[/bold]: nothing is trained or written\n")
    _section(console, "Model", _model(config, shape))
    _section(
        console, "Data", [*_data(found), *_steps(config, found, num_steps), *_evaluation(config)]
    )
    _section(
        console,
        "Tokenizer",
        [(name, found.certificate[name]) for name in ("ids", "terminator", "fingerprint")],
    )
    _section(console, "Tokens", list(_tokens(config, found, layout)))
    _section(console, "Ranks", list(_ranks(config, layout)))
    console.print("[bold]Memory of a GPU[/bold], in GiB: an estimate (docs/memory.md)")
    console.print(_memory_table(memory))
    for line in _verdict(config, memory):
        console.print(f"  {line}", highlight=False)
    console.print()
    _section(console, "Checkpoints", list(_checkpoints(config)))


def _section(console: Console, title: str, facts: Sequence[Fact]) -> None:
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
        table.add_row(label, text)
    console.print(table)
    console.print()


def _model(config: TrainConfig, shape: ModelShape) -> list[Fact]:
    total, active = total_parameters(shape), active_parameters(shape)
    of_token = f", {active / 1e9:.2f} billion of them for a token" if active != total else ""
    precision = "bfloat16, optimized in float32" if config.bf16 else "float32 (--bf16 halves it)"
    return [
        ("checkpoint", config.hf_checkpoint),
        ("family", f"{shape.model_type}, {shape.num_layers} layers of {shape.hidden_size}"),
        ("parameters", f"{total:,} ({total / 1e9:.2f} billion{of_token})"),
        ("precision", precision),
    ]


def _data(found: Survey) -> Iterator[Fact]:
    for source in found.manifest.sources:
        files = f"{len(source.files)} file{'s' if len(source.files) > 1 else ''}"
        yield (
            source.name,
            f"{source.num_rows:,} rows in {files}, {source.format.shape} ({source.files[0].path})",
        )


def _steps(config: TrainConfig, found: Survey, num_steps: int) -> Iterator[Fact]:
    order, plan = config.data.order, found.plan
    shuffled = (
        f"shuffled by seed {order.seed}"
        if order.shuffle
        else "in file order (--rollout-shuffle shuffles)"
    )
    yield "order", f"{shuffled}, {order.batch_size} rows a step"
    limit = f", limited by --num-rollout {config.num_rollout}" if num_steps < plan.num_steps else ""
    yield "steps", f"{num_steps:,}: {plan.steps_per_epoch:,} an epoch x {order.num_epoch}{limit}"
    warmup, optimizer = config.optimizer.warmup_steps(num_steps), config.optimizer
    yield (
        "rate",
        f"{optimizer.lr:g} after {warmup} steps, {optimizer.lr_decay_style} to {optimizer.min_lr:g}",
    )


def _evaluation(config: TrainConfig) -> Iterator[Fact]:
    evaluation = config.evaluation
    when = (
        f"every {evaluation.interval} steps and at the end" if evaluation.interval else "at the end"
    )
    if evaluation.sources:
        rows = count_rows(evaluation.sources)
        yield (
            "evaluation",
            f"{rows:,} rows of {', '.join(source.name for source in evaluation.sources)}, {when}",
        )
    elif config.data.held_out_fraction:
        yield (
            "evaluation",
            f"{config.data.held_out_fraction:.1%} of the rows, not trained on, {when}",
        )


def _tokens(config: TrainConfig, found: Survey, layout: Layout) -> Iterator[Fact]:
    plan, sample = found.plan, found.sample
    lengths = sample.lengths
    usable = len(lengths) / sample.num_rows
    yield "sample", f"{sample.num_rows:,} of {plan.num_rows:,} rows; what follows is told from them"
    dropped = (
        ", ".join(f"{count} {reason}" for reason, count in sample.reasons.most_common()) or "none"
    )
    yield "dropped", dropped
    percentiles = " / ".join(f"{int(length):,}" for length in np.percentile(lengths, [50, 95, 100]))
    yield (
        "lengths",
        f"{lengths.mean():,.0f} tokens on average; half / 95 % / all of the rows are within {percentiles}",
    )
    yield "trained", f"{sample.num_trained_tokens / lengths.sum():.0%} of the tokens"
    epoch = lengths.mean() * usable * plan.rows_per_epoch * (1 - config.data.held_out_fraction)
    yield "an epoch", f"about {epoch:,.0f} tokens"
    rows = max(
        round(config.data.order.batch_size * usable * (1 - config.data.held_out_fraction)), 1
    )
    tokens, num_micro_batches, fill = packed_step(lengths, rows, config.data.pack)
    yield (
        "a step",
        f"about {tokens:,} tokens: {num_micro_batches} micro-batch(es) of {config.data.pack.capacity_tokens:,}"
        f" on each of {layout.data} data-parallel rank(s), {fill:.0%} full",
    )


def _ranks(config: TrainConfig, layout: Layout) -> Iterator[Fact]:
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    sizes += " with sequence parallelism" if layout.sequence_parallel else ""
    sizes += (
        f"; experts over {layout.expert}, each split in {layout.expert_tensor}"
        if layout.expert > 1
        else ""
    )
    yield "layout", f"{layout.world_size} rank(s): {sizes}"
    per_node = config.cluster.gpus_per_node
    for node in range(min(config.cluster.num_nodes, SHOWN_NODES)):
        ranks = range(node * per_node, (node + 1) * per_node)
        stages_here = _span(rank // (layout.tensor * layout.data) for rank in ranks)
        replicas = _span(layout.data_rank(rank) for rank in ranks)
        yield (
            f"node {node}",
            f"ranks {ranks[0]}-{ranks[-1]}: pipeline stage {stages_here}, data rank {replicas}",
        )
    if config.cluster.num_nodes > SHOWN_NODES:
        yield "", f"and {config.cluster.num_nodes - SHOWN_NODES} nodes more"
    if per_node % layout.tensor:
        yield (
            "warning",
            f"the {layout.tensor} tensor-parallel ranks of a replica do not lie on one node of {per_node}: each layer "
            "would wait for the network. Choose a size that divides --actor-num-gpus-per-node",
        )


def _span(numbers: Iterator[int]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _memory_table(memory: Sequence[StageMemory]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    columns = {
        "weights": "weights",
        "gradients": "grads",
        "optimizer": "optimizer",
        "activations": "activ.",
    }
    columns |= {"logits": "logits", "total": "total"}
    for title in ("stage", "layers", "parameters", *columns.values()):  # within 80 characters
        table.add_column(title, justify="right", header_style="dim", no_wrap=True)
    shown = memory if len(memory) <= 4 else (*memory[:2], *memory[-2:])
    for stage in shown:
        sizes = [f"{getattr(stage, name) / 2**30:.2f}" for name in columns]
        table.add_row(str(stage.stage), str(stage.num_layers), f"{stage.num_parameters:,}", *sizes)
    return table


def _verdict(config: TrainConfig, memory: Sequence[StageMemory]) -> Iterator[str]:
    fullest = max(memory, key=lambda stage: stage.total)
    need = fullest.total / 2**30 / (1 - SPARE)
    fitting = [card for card in CARDS_GIB if card >= need]
    spare = f"(with {SPARE:.0%} to spare)"
    if fitting:
        yield f"fits on GPUs of {fitting[0]} GiB or more {spare}"
    else:
        yield f"fits on no GPU of {CARDS_GIB[-1]} GiB or less {spare}"
    if need > 80:
        passing = fullest.activations + fullest.logits
        if passing > fullest.total - passing:
            what = "--max-tokens-per-gpu lower"
            what += (
                ""
                if config.recompute.granularity == "full"
                else ", or --recompute-granularity full"
            )
            yield f"most of it are activations and logits: {what} helps"
        else:
            yield "most of it are weights and their state: more GPUs, or tensor, pipeline or expert parallelism help"


def _checkpoints(config: TrainConfig) -> Iterator[Fact]:
    try:
        start = StartPoint.find(config)
        text = start.url
        if start.is_resume:
            extra = start.checkpoint.extra or {}
            text += f", going on after {extra['cursor']['consumed_rows']:,} rows"
        yield "start", text
    except CheckpointError as error:
        yield "start", f"[red]missing[/red]: {error}"
    every = (
        f"every {config.save_interval} steps and at the end"
        if config.save_interval
        else "at the end"
    )
    where = "" if storage.is_local(config.save) else ", on object storage"
    yield "save", f"{config.save}, {every}{where}"
    if config.keep_last or config.keep_best:
        yield "kept", f"the newest {config.keep_last or 1}, the best {config.keep_best or 0}"
    if config.save_hf:
        yield "export", config.save_hf
    yield "run's folder", config.run_dir
