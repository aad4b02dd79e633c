"""The same losses and gradient norms on any layout, computed in any way, and in plain PyTorch:
real Megatron ranks on the real stream.

Ten steps of AdamW from the same converted weights. Each is a line of docs/parity.md:

    one rank, every switch off   the reference
    one rank, a switch off       against it: loss, loss of each source, gradient norm, at every step
    a layout, the fast way       against it, in the same way
    transformers, unpacked       against it: one sample at a time, no Megatron, no packing, torch's
                                 AdamW

`MILES_WRITE_DOCS=1 pytest tests/integration/test_parity.py` writes the table anew.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.architecture.config import ModelShape
from miles.architecture.families import read_shape
from miles.common import checkpoint_folder
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.data.config import DataConfig, PackConfig
from miles.data.stream.feed import Feed
from miles.train.compute_config import ComputeConfig
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.driver.group import TrainerGroup
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.recompute_config import RecomputeConfig
from miles.train.types import RankSetup, StartPoint
from tests.support.models import make_hf
from tests.support.plain_loop import train_plainly
from tests.support.run_numbers import Numbers
from tests.support.streams import config_of, demo_settings

pytestmark = pytest.mark.slow

NUM_STEPS = 10
OPTIMIZER = OptimizerSettings(lr=2e-3, min_lr=2e-4, lr_warmup_iters=2, weight_decay=0.1)
TABLE = Path(__file__).parents[2] / "docs/parity.md"
ROUNDING = 2e-5
"""Relative, of losses and norms, of the layouts."""
AGAINST_TRANSFORMERS = 1e-4
"""Absolute, of losses, as the trainer promises."""

EVEN = 2048
ODD = 2049
"""Two tensor-parallel ranks add a row of padding to a vocabulary of so many tokens."""

MODELS = {
    "Qwen3, tied": ("qwen3", True, ODD),
    "Qwen3, untied": ("qwen3", False, EVEN),
    "Qwen2.5, tied": ("qwen2", True, EVEN),
    "Qwen2.5, untied": ("qwen2", False, ODD),
    "Llama 3, tied": ("llama", True, EVEN),
    "Llama 3, untied": ("llama", False, ODD),
    "Qwen3-MoE": ("qwen3_moe", False, ODD),
}
"""A name -> the model's family, whether its embeddings are tied, its vocabulary."""


ONE_RANK = Layout(1)

FAST = ComputeConfig(grouped_experts=True)
"""The ways of a GPU, as far as a CPU has them."""
PLAIN = ComputeConfig(
    attention_backend="local",
    transformer_impl="local",
    loss_chunk_size=0,
    loss_fusion=False,
    rope_fusion=False,
    packed_rope=False,
    norm_fusion=False,
    swiglu_fusion=False,
    grad_accumulation_fusion=False,
    adam_fusion=False,
    grouped_experts=False,
    overlap_grad_reduce=False,
    overlap_param_gather=False,
)
"""Every switch off."""
REDUCE = replace(FAST, overlap_grad_reduce=True, overlap_param_gather=False, ddp_bucket_size=1)
OVERLAP = replace(REDUCE, overlap_param_gather=True)
"""Each weight travels by itself: whatever does not wait for its own computes with an old one."""


@dataclass(frozen=True)
class Case:
    """A layout, a way to compute, and what else may not change the numbers."""

    layout: Layout = ONE_RANK
    max_tokens_per_gpu: int = 2048
    batch_size: int = 16
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    compute: ComputeConfig = FAST
    balancing: float = 0.0
    """`--moe-aux-loss-coeff`"""

    @property
    def optimizer(self) -> OptimizerSettings:
        """Return the settings of the optimizer."""
        return replace(OPTIMIZER, moe_aux_loss_coeff=self.balancing)


REFERENCE = Case(compute=PLAIN)
FEW = 3
"""Rows of a step, of which four ranks cannot have one each."""

BALANCING = 0.1
"""The weight of the loss that balances experts, in the lines that are balanced."""

SWITCHES = {
    "--loss-chunk-size 0": Case(compute=replace(FAST, loss_chunk_size=0)),
    "--loss-chunk-size 100": Case(compute=replace(FAST, loss_chunk_size=100)),
    "--no-cross-entropy-loss-fusion": Case(compute=replace(FAST, loss_fusion=False)),
    "--no-packed-rope": Case(compute=replace(FAST, packed_rope=False)),
    "--no-rope-fusion": Case(compute=replace(FAST, rope_fusion=False)),
    "--no-norm-fusion": Case(compute=replace(FAST, norm_fusion=False)),
    "--no-bias-swiglu-fusion": Case(compute=replace(FAST, swiglu_fusion=False)),
    "--no-gradient-accumulation-fusion": Case(
        compute=replace(FAST, grad_accumulation_fusion=False)
    ),
    "--no-adam-fusion": Case(compute=replace(FAST, adam_fusion=False)),
    "--attention-backend local": Case(compute=replace(FAST, attention_backend="local")),
}
"""One rank, one switch off, the others on."""

CASES = {
    "one rank": Case(),
    **SWITCHES,
    "DP 2": Case(Layout(2)),
    "DP 2, --overlap-grad-reduce": Case(Layout(2), compute=REDUCE),
    "DP 2, --overlap-param-gather": Case(Layout(2), compute=OVERLAP),
    "DP 4": Case(Layout(4)),
    "TP 2": Case(Layout(2, tensor=2)),
    "TP 2, sequence parallel": Case(Layout(2, tensor=2, sequence_parallel=True)),
    "PP 2": Case(Layout(2, pipeline=2)),
    "TP 2 x DP 2, sequence parallel, --overlap-param-gather": Case(
        Layout(4, tensor=2, sequence_parallel=True), compute=OVERLAP
    ),
    "PP 2 x DP 2, --overlap-param-gather": Case(Layout(4, pipeline=2), compute=OVERLAP),
    "TP 2 x PP 2": Case(Layout(4, tensor=2, pipeline=2)),
    "TP 2 x PP 2, sequence parallel, full recomputation": Case(
        Layout(4, tensor=2, pipeline=2, sequence_parallel=True),
        recompute=RecomputeConfig("full", "uniform", 1),
    ),
    "selective recomputation": Case(recompute=RecomputeConfig("selective")),
    "full recomputation by blocks": Case(recompute=RecomputeConfig("full", "block", 2)),
    "256 tokens a micro-batch": Case(max_tokens_per_gpu=256),
    "777 tokens a micro-batch, PP 2": Case(Layout(2, pipeline=2), max_tokens_per_gpu=777),
    "3 rows a step, DP 4": Case(Layout(4), batch_size=FEW),
}

MOE_CASES = {
    "one rank": Case(),
    **SWITCHES,
    "--no-moe-grouped-gemm": Case(compute=replace(FAST, grouped_experts=False)),
    "DP 2": Case(Layout(2)),
    "EP 2": Case(Layout(2, expert=2)),
    "EP 2 x DP 4, --overlap-param-gather": Case(Layout(4, expert=2), compute=OVERLAP),
    "PP 2": Case(Layout(2, pipeline=2)),
    "TP 2 x EP 2, sequence parallel": Case(Layout(4, tensor=2, sequence_parallel=True, expert=2)),
    "TP 2, experts too, sequence parallel": Case(
        Layout(2, tensor=2, sequence_parallel=True, expert_tensor=2)
    ),
    "TP 2 x EP 2, experts too, sequence parallel": Case(
        Layout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2)
    ),
    "EP 2 x PP 2, full recomputation": Case(
        Layout(4, pipeline=2, expert=2), recompute=RecomputeConfig("full", "uniform", 1)
    ),
    "3 rows a step, EP 4": Case(Layout(4, expert=4), batch_size=FEW),
    "balanced, 256 tokens a micro-batch": Case(max_tokens_per_gpu=256, balancing=BALANCING),
    "balanced, DP 2": Case(Layout(2), balancing=BALANCING),
    "balanced, EP 2": Case(Layout(2, expert=2), balancing=BALANCING),
    "balanced, TP 2 x EP 2, sequence parallel": Case(
        Layout(4, tensor=2, sequence_parallel=True, expert=2), balancing=BALANCING
    ),
}


class Bench:
    """Trainers that stay alive, models as they are asked for, and one open feed.

    The first block of a feed holds more than ten steps, and stays as long as none beyond it is
    needed: every model that takes the same data reads them from the same feed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = demo_settings(folder, batch_size=16, num_epoch=1)
        self.groups: dict[int, TrainerGroup] = {}
        self.known: dict[tuple[str, Case], Numbers] = {}
        self.open_feed: tuple[DataConfig, Feed] | None = None

    def close(self) -> None:
        """Close the feed and end the trainers."""
        for group in self.groups.values():
            group.shut_down()
        if self.open_feed is not None:
            self.open_feed[1].close()

    def data(self, case: Case) -> DataConfig:
        """Return the data's configuration for a case."""
        config = config_of(self.settings)
        return replace(
            config,
            order=replace(config.order, batch_size=case.batch_size),
            pack=PackConfig(case.layout.data, case.max_tokens_per_gpu),
        )

    def model(self, name: str) -> tuple[Path, ModelShape, checkpoint_folder.SavedCheckpoint]:
        """Return a model's folder, its shape and its converted checkpoint; make them if need be."""
        hf, megatron = self.folder / "hf" / name, self.folder / "megatron" / name
        if not hf.exists():
            model_type, tied, vocab_size = MODELS[name]
            make_hf(hf, model_type, tied=tied, vocab_size=vocab_size)
            hf_to_megatron(str(hf), str(megatron))
        found = checkpoint_folder.find(str(megatron))
        assert found is not None
        return hf, read_shape(str(hf)), found

    def feed(self, data: DataConfig) -> Feed:
        """Return the feed of a configuration; close that of another one."""
        if self.open_feed is None or self.open_feed[0] != data:
            if self.open_feed is not None:
                self.open_feed[1].close()
            run_dir = tempfile.mkdtemp(dir=self.folder)
            num_ranks = data.pack.dp_size
            feed = Feed.open(
                data, cursor=None, cursor_path="", num_ranks=num_ranks, run_dir=run_dir
            )
            self.open_feed = (data, feed)
        return self.open_feed[1]

    def group(self, cluster: ClusterConfig) -> TrainerGroup:
        """Return as many trainers as a cluster has ranks."""
        if cluster.world_size not in self.groups:
            self.groups[cluster.world_size] = TrainerGroup(cluster, on_gpu=False)
        return self.groups[cluster.world_size]

    def run(self, name: str, case: Case) -> Numbers:
        """Return the numbers of ten steps of a model on a layout."""
        if (name, case) not in self.known:
            self.known[name, case] = self._run(name, case)
        return self.known[name, case]

    def _run(self, name: str, case: Case) -> Numbers:
        hf, shape, found = self.model(name)
        cluster = ClusterConfig(
            gpus_per_node=case.layout.world_size,
            tensor=case.layout.tensor,
            pipeline=case.layout.pipeline,
            expert=case.layout.expert,
            expert_tensor=case.layout.expert_tensor,
            sequence_parallel=case.layout.sequence_parallel,
            timeout_minutes=3,
        )
        assert cluster.layout == case.layout
        data = self.data(case)
        config = TrainConfig(
            hf_checkpoint=str(hf),
            ref_load="",
            save="",
            data=data,
            optimizer=case.optimizer,
            recompute=case.recompute,
            compute=case.compute,
            cluster=cluster,
            bf16=False,
        )

        group, feed = self.group(cluster), self.feed(data)
        start = StartPoint(found, is_resume=False)
        setup = RankSetup.of(
            config, shape, start, num_steps=NUM_STEPS, num_sources=len(data.sources)
        )
        group.setup(setup)
        group.attach_feed(feed.handle, 0, NUM_STEPS)
        results = [group.train_step() for _ in range(NUM_STEPS)]

        assert not any(result.skip for result in results)
        numbers = Numbers([], [], [], [])
        for result in results:
            sums = zip(result.source_losses, result.source_tokens, strict=True)
            numbers.losses.append(result.loss)
            numbers.source_losses.append(tuple(loss / max(count, 1) for loss, count in sums))
            numbers.grad_norms.append(result.grad_norm)
            numbers.rates.append(result.lr)
            if case.balancing:
                numbers.balancing_losses.append(result.router.aux_loss)
        return numbers


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The bench, with the reference of every model, each of which many cases are compared with."""
    bench = Bench(tmp_path_factory.mktemp("parity"))
    for reference in (REFERENCE, replace(REFERENCE, batch_size=FEW)):
        for name in MODELS:
            bench.run(name, reference)
    yield bench
    bench.close()


SECOND = ("Qwen3, untied", "Qwen2.5, tied", "Llama 3, untied")
"""Of each family the other way to end: what an embedding at both ends cannot change is not tried
again.
"""

ONCE = (
    "DP 2",
    "TP 2",
    "selective recomputation",
    "full recomputation by blocks",
    "777 tokens a micro-batch, PP 2",
)
SWITCHED: dict[str, tuple[str, ...]] = {
    "Qwen3, tied": tuple(SWITCHES),
    "Llama 3, untied": (
        "--loss-chunk-size 0",
        "--no-packed-rope",
        "--no-gradient-accumulation-fusion",
    ),
    "Qwen3-MoE": (
        "--loss-chunk-size 0",
        "--no-bias-swiglu-fusion",
        "--no-gradient-accumulation-fusion",
    ),
}
"""The switches that are tried on a model: all on one; on two others those that can differ there."""
OVERLAPPED = ("Qwen3, tied", "Qwen2.5, untied", "Qwen3-MoE")


def is_tried(name: str, layout: str) -> bool:
    """Return whether a cell of the table is filled."""
    if layout in SWITCHES:
        return layout in SWITCHED.get(name, ())
    if "--overlap" in layout:
        return name in OVERLAPPED
    return not (name in SECOND and layout in ONCE)


ALL = [
    (name, layout)
    for name in MODELS
    for layout in (MOE_CASES if name == "Qwen3-MoE" else CASES)
    if is_tried(name, layout)
]
table: dict[tuple[str, str], float] = {}


def case_of(name: str, layout: str) -> Case:
    """Return what a line of the table stands for in a model's column."""
    return (MOE_CASES if name == "Qwen3-MoE" else CASES)[layout]


def data_of(model_and_layout: tuple[str, str]) -> tuple[int, int, int]:
    """Return what the data depends on; cases that share it follow one another and share a feed."""
    case = case_of(*model_and_layout)
    return case.batch_size, case.layout.data, case.max_tokens_per_gpu


@pytest.mark.parametrize(("name", "layout"), sorted(ALL, key=data_of))
def test_layout_changes_no_number(bench: Bench, name: str, layout: str) -> None:
    case = case_of(name, layout)
    plain = replace(REFERENCE, batch_size=case.batch_size, balancing=case.balancing)
    reference = bench.run(name, plain)
    table[name, layout] = difference = bench.run(name, case).difference(reference)
    assert reference.losses[-1] < reference.losses[0], "nothing was learnt"
    assert difference < ROUNDING


TRANSFORMERS = "transformers, unpacked"
BALANCED = "balanced, transformers, unpacked"
PLAIN_CASES = [*((name, TRANSFORMERS) for name in MODELS), ("Qwen3-MoE", BALANCED)]


@pytest.mark.parametrize(("name", "line"), PLAIN_CASES)
def test_plain_loop_gives_the_same_numbers(bench: Bench, name: str, line: str) -> None:
    torch.set_num_threads(1)
    case = replace(REFERENCE, balancing=BALANCING if line == BALANCED else 0.0)
    ours = bench.run(name, case)
    theirs = train_plainly(bench.model(name)[0], bench.data(case), case.optimizer, NUM_STEPS)
    table[name, line] = theirs.difference(ours)
    np.testing.assert_allclose(ours.rates, theirs.rates, rtol=1e-12)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=AGAINST_TRANSFORMERS)
    np.testing.assert_allclose(
        ours.source_losses, theirs.source_losses, rtol=0, atol=2 * AGAINST_TRANSFORMERS
    )
    np.testing.assert_allclose(ours.grad_norms, theirs.grad_norms, rtol=1e-3)


def written(differences: dict[tuple[str, str], float]) -> str:
    """docs/parity.md: what was compared, and a table of the differences."""
    layouts = [*CASES, *(layout for layout in MOE_CASES if layout not in CASES)]
    layouts += [TRANSFORMERS, BALANCED]
    lines = [
        "# The same numbers on any layout",
        "",
        "Written by `tests/integration/test_parity.py`, which runs in CI; do not edit by hand.",
        "",
        "Tiny models of each family, converted from Hugging Face checkpoints, are trained for "
        f"{NUM_STEPS} steps of",
        "AdamW in float32 by real Megatron ranks (gloo, on CPUs), fed by the real stream with two",
        "sources. A cell is the largest relative difference over all steps from one rank that computes",
        "in the plain way, with every switch of [flags.md](flags.md#the-ways-in-which-a-step-is-computed)",
        "off and a single micro-batch a step: of the loss, of each source's loss, and of the gradient's",
        "norm. The other lines compute in the fast way, as far as a CPU has it: a line with a flag has",
        "that switch off, or on for `--overlap-…`. The last two lines compare with a plain PyTorch loop",
        "over the model of transformers: one sample at a time, unpacked, torch's own AdamW.",
        "",
        f"The vocabulary of some models has {ODD:,} tokens, so that two tensor-parallel ranks add a row of",
        f"padding: {', '.join(name for name, (*_, size) in MODELS.items() if size == ODD)}.",
        "",
        f"The tests fail above {ROUNDING:.0e} for a layout, and above {AGAINST_TRANSFORMERS:.0e} "
        "(absolute, of the loss) against",
        "transformers. Other machines round otherwise: the digits differ, the bounds hold.",
        "",
        "| layout | " + " | ".join(MODELS) + " |",
        "|---" * (len(MODELS) + 1) + "|",
    ]

    for layout in layouts:
        cells = [
            f"{differences[name, layout]:.0e}" if (name, layout) in differences else ""
            for name in MODELS
        ]
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")

    lines += [
        "",
        "An empty cell was not tried, because the cell beside it shows the same.",
        "",
        "DP, TP, PP, EP: data, tensor, pipeline and expert parallel size. Only Qwen3-MoE has experts.",
        "With 3 rows a step on four ranks, a rank has a dummy micro-batch, in which nothing is trained.",
        "*Experts too*: each expert is split by tensor parallelism as well; else it is whole on a rank.",
        f"*Balanced* lines train with `--moe-aux-loss-coeff {BALANCING}`, and compare the balancing loss too.",
    ]
    return "\n".join(lines) + "\n"


def test_docs_show_this_table() -> None:
    if len(table) < len(ALL) + len(PLAIN_CASES):
        pytest.skip("the table is of all of this file's tests")
    if os.environ.get("MILES_WRITE_DOCS"):
        TABLE.write_text(written(table))
    shown = TABLE.read_text()
    digits = re.compile(r"\d+e[-+]\d+")
    assert digits.sub("#", shown) == digits.sub("#", written(table)), (
        "MILES_WRITE_DOCS=1 writes it anew"
    )
    cells = [float(cell) for cell in re.findall(r"\| (\d+e[-+]\d+) (?=\|)", shown)]
    assert len(cells) == len(table)
    assert max(cells) < ROUNDING
