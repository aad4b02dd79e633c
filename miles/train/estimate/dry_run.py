"""`miles train … --dry-run`: everything that can be known of a run without starting it.

flags -> model · data · tokenizer · tokens · ranks on nodes · memory of each GPU · checkpoints

It looks at what a run looks at before it starts (`preflight`), and ends with the error that would
stop the run. It needs no GPU and no Ray; of Hugging Face weights, the headers are compared with the
model. Rows and steps are counted. Tokens are those of a sample, which the text
states. Memory is an estimate; docs/memory.md says which numbers are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.architecture.adapter import described
from miles.architecture.config import ModelShape
from miles.architecture.sizes import active_parameters, padded_vocab_size, total_parameters
from miles.common import storage
from miles.common.counts import counted
from miles.common.facts import Facts
from miles.common.prose import Prose
from miles.data.stream import account
from miles.data.stream.survey import Survey, packed_step
from miles.train.config import TrainConfig
from miles.train.estimate.memory import StageMemory
from miles.train.estimate.preflight import Preflight, preflight, run_memory
from miles.train.precision import Precision
from miles.train.run_length import run_length
from miles.train.types import StartPoint

SHOWN_NODES = 8
_COLUMN_GAP = 2

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
        MilesError: the run could not start. If only the checkpoint is missing, or no GPU is large
            enough, all the rest is printed first.
    """
    found = preflight(config, is_dry_run=True)
    if found.start is not None:
        config = found.start.continued(config)

    console.print(Text.assemble(("Dry run", "bold"), ": nothing is trained or written\n"))
    notices = (*notices, *found.notices)
    for notice in notices:
        console.print(Prose(f"  {notice}"), soft_wrap=True)
    if notices:
        console.print()
    _section(console, "Model", _model(config, found.shape))
    _section(console, "Data", [*_data(found), *_steps(config, found), *_evaluation(config, found)])
    _section(console, "Tokenizer", _tokenizer(found))
    _section(console, "Tokens", _tokens(config, found.survey))
    _section(console, "Ranks", _ranks(config, found.shape))
    console.print(
        Text.assemble(("Memory of a GPU", "bold"), ", in GiB: an estimate (docs/memory.md)")
    )
    console.print(_memory_table(found.memory, console.width))
    verdict = (*found.fit.verdict(), *_of_machine(config, found.memory))
    for line in (*verdict, *_beside_full(config, found)):
        console.print(Prose(f"  {line}"), soft_wrap=True)
    console.print()
    _section(console, "Checkpoints", _checkpoints(config, found))

    found.require_start()
    found.fit.require_some_gpu()


def _section(console: Console, title: str, facts: Iterable[Fact]) -> None:
    console.print(Facts(facts, title), soft_wrap=True)
    console.print()


def _model(config: TrainConfig, shape: ModelShape) -> Iterator[Fact]:
    total = total_parameters(shape)
    active = active_parameters(shape)
    yield "checkpoint", config.hf_checkpoint
    yield (
        "family",
        f"{shape.model_type}, {counted(shape.num_layers, 'layer')} of {shape.hidden_size}",
    )

    of_token = f", {active / 1e9:.2f} billion of them for a token" if active != total else ""
    rounded = f"{total / 1e9:.2f} billion" if total >= 1e8 else f"{total / 1e6:.2f} million"
    yield "parameters", f"{total:,} ({rounded}{of_token})"

    precision = _PRECISIONS[config.precision]
    if config.precision is None and config.optimizer.cpu_offload:
        precision += ", which --optimizer-cpu-offload refuses: it needs --bf16 there"
    yield "precision", precision

    adapter = config.lora.adapter(shape)
    if adapter is not None:
        yield "adapter", described(shape, adapter, total)


def _data(found: Preflight) -> Iterator[Fact]:
    for source in found.survey.stream.manifest.sources:
        rows = f"{counted(source.num_rows, 'row')} in {counted(len(source.files), 'file')}"
        yield source.name, f"{rows}, {source.format.shape} ({source.files[0].path})"
    yield from account.of_manifest(found.survey.stream.manifest)


def _steps(config: TrainConfig, found: Preflight) -> Iterator[Fact]:
    order = config.data.order
    plan = found.survey.stream.plan
    num_steps = found.num_steps
    shuffle = "in file order (--rollout-shuffle shuffles)"
    if order.shuffle:
        shuffle = f"shuffled by seed {order.seed}"
    yield "order", f"{shuffle}, {counted(order.batch_size, 'row')} a step"

    yield "steps", f"{num_steps:,}: {run_length(config, plan.steps_per_epoch, plan.num_steps)}"

    optimizer = config.optimizer
    num_warmup = optimizer.warmup_steps(num_steps)
    warmup = f"after {counted(num_warmup, 'step')}" if num_warmup else "from the first step on"
    decay = f"{optimizer.lr_decay_style} to {optimizer.min_lr:g}"
    yield "rate", f"{optimizer.lr:g} {warmup}, {decay}"


def _evaluation(config: TrainConfig, found: Preflight) -> Iterator[Fact]:
    evaluation = config.evaluation
    when = "at the end"
    if evaluation.interval:
        when = f"{_every(evaluation.interval)} and at the end"

    if found.eval_survey is not None:
        manifest = found.eval_survey.manifest
        names = ", ".join(manifest.source_names)
        yield "evaluation", f"{counted(manifest.num_rows, 'row')} of {names}, {when}"
        keys = account.of_keys(found.eval_survey.sample.unused_keys)
        for label, text in (*keys, *account.of_manifest(manifest)):
            yield label, f"evaluation: {text}"
    elif config.data.held_out_fraction:
        share = f"{config.data.held_out_fraction:.1%} of the rows"
        yield "evaluation", f"{share}, not trained on, {when}"


def _tokenizer(found: Preflight) -> Iterator[Fact]:
    for name in ("ids", "terminator", "fingerprint"):
        yield name, found.survey.certificate[name]


def _tokens(config: TrainConfig, surveyed: Survey) -> Iterator[Fact]:
    sample = surveyed.sample
    plan = surveyed.stream.plan
    lengths = sample.lengths
    rows = f"{sample.num_rows:,} of {plan.num_rows:,} rows"
    yield "sample", f"{rows}; the numbers below are estimated from them"

    yield from account.dropped(sample.reasons) or [("dropped", "none")]
    yield from account.of_keys(sample.unused_keys)

    percentiles = [f"{int(length):,}" for length in np.percentile(lengths, [50, 95, 100])]
    half, most, longest = percentiles
    within = f"half of the rows have up to {half}, 95% up to {most}, the longest {longest}"
    yield "lengths", f"{lengths.mean():,.0f} tokens on average; {within}"
    yield "trained", f"{sample.num_trained_tokens / lengths.sum():.0%} of the tokens"

    # A row gives a sample if it is usable and not held out.
    trained_share = len(lengths) / sample.num_rows * (1 - config.data.held_out_fraction)
    epoch_tokens = lengths.mean() * trained_share * plan.rows_per_epoch
    yield "an epoch", f"about {epoch_tokens:,.0f} tokens"

    step_samples = max(round(config.data.order.batch_size * trained_share), 1)
    pack = config.data.pack
    tokens, num_micro_batches, fill = packed_step(lengths, step_samples, pack)
    batches = f"{counted(num_micro_batches, 'micro-batch', 'micro-batches')} of "
    batches += f"{pack.capacity_tokens:,}"
    ranks = "on one rank"
    if pack.dp_size > 1:
        ranks = f"on each of {pack.dp_size:,} data-parallel ranks"
    yield "a step", f"about {tokens:,} tokens: {batches} {ranks}, {fill:.0%} full"


def _ranks(config: TrainConfig, shape: ModelShape) -> Iterator[Fact]:
    layout = config.cluster.layout
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    if layout.sequence_parallel:
        sizes += " with sequence parallelism"
    if layout.expert > 1:
        sizes += f"; experts over {layout.expert}"
        if layout.expert_tensor > 1:
            sizes += f", each split in {layout.expert_tensor}"
    yield "layout", f"{counted(layout.world_size, 'rank')}: {sizes}"

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
        noun = "rank" if len(ranks) == 1 else "ranks"
        yield f"node {node}", f"{noun} {_span(ranks)}: {place}"
    if num_nodes > SHOWN_NODES:
        yield "", f"and {num_nodes - SHOWN_NODES} nodes more"

    if per_node % layout.tensor:
        yield (
            "warning",
            f"the {layout.tensor} tensor-parallel ranks of a replica do not lie on one node of "
            f"{per_node}: each layer would wait for the network. Choose a size that divides "
            "--actor-num-gpus-per-node",
        )


def _every(num_steps: int) -> str:
    return "after every step" if num_steps == 1 else f"every {num_steps:,} steps"


def _span(numbers: Iterable[int]) -> str:
    """Return the first and the last of some numbers: `2-3`, or `2` where they are one."""
    distinct = sorted(set(numbers))
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]}-{distinct[-1]}"


def _memory_table(memory: Sequence[StageMemory], num_columns: int) -> Table:
    """Return the table; of many pipeline stages the first and last two.

    It takes 80 columns at most. On a narrower screen it stands on its side, a column for a stage.
    """
    titles = ("stage", "layers", "parameters", "weights", "grads", "optimizer", "activ.", "loss")
    rows = [[*titles, "total"]]
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
        rows.append([str(stage.stage), str(stage.num_layers), f"{stage.num_parameters:,}", *gib])

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_narrow = sum(widths) + _COLUMN_GAP * (len(widths) - 1) > num_columns
    table = Table(box=None, padding=(0, _COLUMN_GAP // 2), pad_edge=False, show_header=False)
    for _ in rows if is_narrow else rows[0]:
        table.add_column(justify="right", no_wrap=True)
    if is_narrow:
        for title, *numbers in zip(*rows, strict=True):
            table.add_row(Text(title, "dim"), *numbers)
    else:
        table.add_row(*(Text(title, "dim") for title in rows[0]))
        for row in rows[1:]:
            table.add_row(*row)
    return table


def _of_machine(config: TrainConfig, memory: Sequence[StageMemory]) -> Iterator[str]:
    """Say what the ranks on a machine take of its own memory."""
    num_ranks = config.cluster.gpus_per_node
    fullest = max(memory, key=lambda stage: stage.host + stage.host_rounding + stage.host_saving)
    state = fullest.host / 2**30 * num_ranks
    rounding = fullest.host_rounding / 2**30 * num_ranks
    saving = fullest.host_saving / 2**30 * num_ranks
    saves = f"a save takes up to {saving:,.2f} GiB of a machine's memory for a moment"
    if num_ranks > 1:
        saves += f": {saving / num_ranks:,.2f} for each of {num_ranks:,} ranks"
    if not state:
        yield saves
        return

    yield (
        f"{state:,.2f} GiB of the memory of a machine are the optimizer's: "
        f"{state / num_ranks:,.2f} for each rank on it (--optimizer-cpu-offload)"
    )
    yield f"{rounding:,.2f} GiB more as pinned memory is handed out in powers of two"
    yield saves
    yield f"a machine needs {state + rounding + saving:,.0f} GiB in all, beside its loaders"


def _beside_full(config: TrainConfig, found: Preflight) -> Iterator[str]:
    """Say what a run with an adapter saves beside one that trains all weights."""
    if not config.lora.is_on:
        return
    full = max(stage.total for stage in run_memory(config, found.shape, None)) / 2**30
    own = max(stage.total for stage in found.memory) / 2**30
    yield f"with LoRA {own:,.2f} GiB; training all weights would take {full:,.2f} GiB"


def _checkpoints(config: TrainConfig, found: Preflight) -> Iterator[Fact]:
    if found.start is not None:
        yield "start", _start(found.start)
    else:
        yield "start", Text.assemble(("missing", "red"), ": the error at the end says what to do")

    every = "at the end"
    if config.save_interval:
        every = f"{_every(config.save_interval)} and at the end"
    where = "" if storage.is_local(config.save) else ", on object storage"
    yield "save", f"{config.save}, {every}{where}"

    if config.keep_last or config.keep_best:
        yield "kept", f"the newest {config.keep_last or 1}, the best {config.keep_best or 0}"
    if config.save_hf:
        yield "export", config.save_hf
    yield "run's folder", config.run_dir


def _start(start: StartPoint) -> str:
    if start.adapter_path is not None:
        return start.origin
    if start.checkpoint.is_hugging_face:
        return f"{start.url}, each rank reads its own part"
    if not start.is_resume:
        return start.url
    extra = start.checkpoint.extra or {}
    return f"{start.url}, resuming after {counted(extra['cursor']['consumed_rows'], 'row')}"
