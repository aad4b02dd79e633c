"""The same losses and gradient norms on any layout, computed in any way, and in plain PyTorch:
real Megatron ranks on the real stream.

A few steps of AdamW from the same converted weights. Each is a line of docs/parity.md:

    one rank, every switch off   the reference
    one rank, a switch off       against it: loss, loss of each source, gradient norm, at every step
    a layout, the fast way       against it, in the same way
    transformers, unpacked       against it: one sample at a time, no Megatron, no packing, torch's
                                 AdamW
    LoRA, …                      against adapters on one rank, every switch off
    LoRA, PEFT, unpacked         against them, too: as above, with PEFT's adapters

`MILES_WRITE_DOCS=1 pytest tests/integration/test_parity.py` writes the table anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.train.parallel_layout import Layout
from miles.train.recompute_config import RecomputeConfig
from tests.support.parity import (
    BALANCING,
    FAST,
    LORA,
    MODELS,
    NUM_STEPS,
    ODD,
    OVERLAP,
    REDUCE,
    REFERENCE,
    Bench,
    Case,
    plain,
)

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[2] / "docs/parity.md"
ROUNDING = 2e-5
"""Relative, of losses and norms, of the layouts."""
AGAINST_TRANSFORMERS = 1e-4
"""Absolute, of losses, as the trainer promises."""

FEW = 3
"""Rows of a step, of which four ranks cannot have one each."""

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
    "777 tokens a micro-batch": Case(max_tokens_per_gpu=777),
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
    "balanced, 777 tokens a micro-batch": Case(max_tokens_per_gpu=777, balancing=BALANCING),
    "balanced, DP 2": Case(Layout(2), balancing=BALANCING),
    "balanced, EP 2": Case(Layout(2, expert=2), balancing=BALANCING),
    "balanced, TP 2 x EP 2, sequence parallel": Case(
        Layout(4, tensor=2, sequence_parallel=True, expert=2), balancing=BALANCING
    ),
}


DROPOUT = replace(LORA, dropout=0.2)

LORA_CASES = {
    "LoRA, one rank": Case(lora=LORA),
    "LoRA, TP 2, sequence parallel": Case(Layout(2, tensor=2, sequence_parallel=True), lora=LORA),
    "LoRA, PP 2": Case(Layout(2, pipeline=2), lora=LORA),
    "LoRA with dropout, TP 2 x PP 2, sequence parallel, full recomputation": Case(
        Layout(4, tensor=2, pipeline=2, sequence_parallel=True),
        recompute=RecomputeConfig("full", "uniform", 1),
        lora=DROPOUT,
    ),
    "LoRA with dropout, TP 2 x EP 2, sequence parallel": Case(
        Layout(4, tensor=2, sequence_parallel=True, expert=2), lora=DROPOUT
    ),
}
"""Adapters beside frozen weights, on the stream; `tests/train/rank/test_adapter_layouts.py` has the
other layouts, with dropout and with overlap.
"""
ADAPTED: dict[str, tuple[str, ...]] = {
    "Qwen3, tied": tuple(name for name in LORA_CASES if "EP" not in name),
    "Qwen2.5, untied": ("LoRA, TP 2, sequence parallel",),
    "Qwen3-MoE": tuple(name for name in LORA_CASES if "EP" in name),
}
"""Of each way to end a model one, and experts, which have none."""


SECOND = ("Qwen3, untied", "Qwen2.5, tied", "Llama 3, untied")
"""Of each family the other way to end."""
AT_BOTH_ENDS = (
    "one rank",
    "TP 2, sequence parallel",
    "PP 2",
    "TP 2 x PP 2, sequence parallel, full recomputation",
)
"""The layouts in which an embedding that is the output layer, too, can change something."""

FIRST_ONLY = (
    "DP 2",
    "TP 2",
    "TP 2 x PP 2",
    "selective recomputation",
    "full recomputation by blocks",
    "777 tokens a micro-batch",
    "3 rows a step, DP 4",
)
"""In these, no model differs from the first but in its layers, which the other lines have."""
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
OVERLAPPED: dict[str, tuple[str, ...]] = {
    "DP 2, --overlap-grad-reduce": ("Qwen3, tied",),
    "DP 2, --overlap-param-gather": ("Qwen3, tied",),
    "TP 2 x DP 2, sequence parallel, --overlap-param-gather": ("Qwen3, tied", "Qwen2.5, untied"),
    "PP 2 x DP 2, --overlap-param-gather": ("Qwen3, tied", "Qwen2.5, untied"),
    "EP 2 x DP 4, --overlap-param-gather": ("Qwen3-MoE",),
}
"""The models of a line with overlap: one of each way to end, where ranks share more than the data."""


def is_tried(name: str, layout: str) -> bool:
    """Return whether a cell of the table is filled."""
    if layout in SWITCHES:
        return layout in SWITCHED.get(name, ())
    if "--overlap" in layout:
        return name in OVERLAPPED.get(layout, ())
    if name in SECOND:
        return layout in AT_BOTH_ENDS
    return name in ("Qwen3, tied", "Qwen3-MoE") or layout not in FIRST_ONLY


ALL = [
    (name, layout)
    for name in MODELS
    for layout in (MOE_CASES if name == "Qwen3-MoE" else CASES)
    if is_tried(name, layout)
]
ALL += [(name, layout) for name, layouts in ADAPTED.items() for layout in layouts]
table: dict[tuple[str, str], float] = {}


def case_of(name: str, layout: str) -> Case:
    """Return what a line of the table stands for in a model's column."""
    if layout in LORA_CASES:
        return LORA_CASES[layout]
    return (MOE_CASES if name == "Qwen3-MoE" else CASES)[layout]


def reference_of(case: Case) -> Case:
    """Return what a case is compared with: the same on one rank, every switch off."""
    return replace(REFERENCE, batch_size=case.batch_size, lora=case.lora, balancing=case.balancing)


def data_of(case: Case) -> tuple[int, int, int]:
    """Return what the data depends on; cases that share it follow one another and share a feed."""
    return case.batch_size, case.layout.data, case.max_tokens_per_gpu


ALL.sort(key=lambda model_and_layout: data_of(case_of(*model_and_layout)))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The bench, with all references, each of which many cases are compared with."""
    bench = Bench(tmp_path_factory.mktemp("parity"))
    references = {(name, reference_of(case_of(name, layout))) for name, layout in ALL}
    references |= {(name, LOOPS[loop]) for name, loop in PLAIN_LOOPS}
    for name, reference in sorted(references, key=lambda one: (data_of(one[1]), one[0])):
        bench.run(name, reference)
    yield bench
    bench.close()


@pytest.mark.parametrize(("name", "layout"), ALL)
def test_layout_changes_no_number(bench: Bench, name: str, layout: str) -> None:
    case = case_of(name, layout)
    reference = bench.run(name, reference_of(case))
    table[name, layout] = difference = bench.run(name, case).difference(reference)
    assert reference.losses[-1] < reference.losses[0], "nothing was learnt"
    assert difference < ROUNDING


TRANSFORMERS = "transformers, unpacked"
PEFT = "LoRA, PEFT, unpacked"
BALANCED = "balanced, transformers, unpacked"
LOOPS = {
    TRANSFORMERS: REFERENCE,
    PEFT: replace(REFERENCE, lora=LORA),
    BALANCED: replace(REFERENCE, balancing=BALANCING),
}
"""A line of the table -> what it is compared with."""
PLAIN_LOOPS = [
    *((name, TRANSFORMERS) for name in MODELS),
    *((name, PEFT) for name in ADAPTED),
    ("Qwen3-MoE", BALANCED),
]


@pytest.mark.parametrize(("name", "loop"), PLAIN_LOOPS)
def test_plain_loop_gives_the_same_numbers(bench: Bench, name: str, loop: str) -> None:
    torch.set_num_threads(1)
    case = LOOPS[loop]
    ours = bench.run(name, case)
    theirs = plain(bench.model(name)[0], bench.data(case), case)
    table[name, loop] = theirs.difference(ours)
    np.testing.assert_allclose(ours.rates, theirs.rates, rtol=1e-12)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=AGAINST_TRANSFORMERS)
    np.testing.assert_allclose(
        ours.source_losses, theirs.source_losses, rtol=0, atol=2 * AGAINST_TRANSFORMERS
    )
    np.testing.assert_allclose(ours.grad_norms, theirs.grad_norms, rtol=1e-3)


def written(differences: dict[tuple[str, str], float]) -> str:
    """docs/parity.md: what was compared, and a table of the differences."""
    layouts = [*CASES, *(layout for layout in MOE_CASES if layout not in CASES), TRANSFORMERS]
    layouts += [BALANCED, *LORA_CASES, PEFT]
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
        "that switch off, or on for `--overlap-…`. Those of transformers compare with a plain PyTorch",
        "loop over its model: one sample at a time, unpacked, torch's own AdamW.",
        "",
        "In the lines of LoRA, adapters are trained beside frozen weights, on all linear layers that are",
        "no experts. They are compared with adapters on one rank that computes in the plain way; the last",
        "one with PEFT's over the model of transformers. Dropout is a function of the token, so that any",
        "layout drops the same.",
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
        "An empty cell was not tried, because another one of its line and its column show the same.",
        "",
        "DP, TP, PP, EP: data, tensor, pipeline and expert parallel size. Only Qwen3-MoE has experts.",
        "With 3 rows a step on four ranks, a rank has a dummy micro-batch, in which nothing is trained.",
        "*Experts too*: each expert is split by tensor parallelism as well; else it is whole on a rank.",
        f"*Balanced* lines train with `--moe-aux-loss-coeff {BALANCING}`, and compare the balancing loss too.",
    ]
    return "\n".join(lines) + "\n"


def test_docs_show_this_table() -> None:
    if len(table) < len(ALL) + len(PLAIN_LOOPS):
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
