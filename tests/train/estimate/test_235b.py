"""The arithmetic of Qwen3-235B-A22B on four nodes of eight GPUs, as docs/memory.md shows it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from miles.architecture.families import shape_of
from miles.train.estimate.gpu_fit import SPARE
from miles.train.estimate.memory import StageMemory, Training, estimate
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import RecomputeConfig
from tests.support.launch import QWEN3_235B

LAYOUT = Layout(32, tensor=4, sequence_parallel=True, expert=32)
RANKS_OF_A_NODE = 8
OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
PAGE = Path(__file__).parents[3] / "docs/memory.md"


def memory(layout: Layout = LAYOUT) -> StageMemory:
    (stage,) = estimate(
        shape_of(QWEN3_235B, "there"),
        layout,
        Training(
            Precision.BF16,
            RecomputeConfig("full", "uniform", 1),
            OptimizerSettings(precision_aware=True, cpu_offload=True),
        ),
        9216,
    )
    return stage


def table(title: str) -> dict[str, tuple[str, float]]:
    """Return the rows of a table of the page: name -> where its number is from, and the number."""
    section = PAGE.read_text(encoding="utf-8").split("## The 235B")[1]
    lines = section.split(f"| {title} |")[1].split("\n\n")[0].splitlines()[2:]
    rows = {}
    for line in lines:
        name, source, number = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = (source, float(number.replace(",", "")))
    return rows


def computed(source: str) -> float:
    """Return the value of the arithmetic in a cell: `94 x 4 of 128 x 3` is 94 x 4 x 3."""
    text = re.sub(r" of 128| parameters| tokens| rows", "", source).replace(",", "")
    return _value(ast.parse(text.replace("x", "*"), mode="eval").body)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    return float(ast.literal_eval(node))


def gib(num_bytes: float) -> float:
    return round(num_bytes / 2**30, 2)


def test_the_parameters_of_a_rank_add_up() -> None:
    rows = table("parameters of each rank")
    _, total = rows.pop("total")
    for name, (source, number) in rows.items():
        assert computed(source) == number, name
    assert sum(number for _, number in rows.values()) == total == memory().num_parameters


def test_the_memory_of_a_gpu_is_the_estimate() -> None:
    stage = memory()
    rows = table("on each GPU")
    for name, (_, number) in rows.items():
        assert number == gib(getattr(stage, name)), name
    assert gib(computed(rows["weights"][0])) == rows["weights"][1]
    assert gib(computed(rows["loss"][0])) == rows["loss"][1]

    # The inputs of all layers; one layer, whose copies of a token for its experts are a fourth of 8;
    # cosine, sine, and the input of the last norm. Their numbers in float32 are left out.
    layer = 4 * 1024 + (16384 + 1024) / 4 + 8 / 4 * (4096 + 3 * 1536) + (8192 + 1024) / 4
    values = 94 * 1024 + layer + 1024
    assert stage.activations == pytest.approx(9216 * (values * 2 + 2 * 128 * 4), rel=0.001)

    need = stage.total / 2**30 / (1 - SPARE)
    assert f"With a tenth to spare that is {need:.1f} GiB" in PAGE.read_text(encoding="utf-8")
    assert need < 80


def test_the_memory_of_a_machine_is_the_estimate() -> None:
    stage = memory()
    rows = table("on each machine, for 8 ranks")
    by_name = {
        "offloaded state": stage.host,
        "rounding": stage.host_rounding,
        "save": stage.host_saving,
        "total": stage.host + stage.host_rounding + stage.host_saving,
    }
    for name, (_, number) in rows.items():
        assert number == gib(by_name[name] * RANKS_OF_A_NODE), name
    for name in ("offloaded state", "save"):
        assert gib(computed(rows[name][0])) == rows[name][1], name
    of_experts = 94 * 4 * (64 - 48 + 32 - 24) << 20
    assert of_experts < stage.host_rounding < 1.1 * of_experts


def test_more_nodes_divide_the_state_of_the_experts() -> None:
    more = memory(replace(LAYOUT, world_size=64))
    assert more.host == pytest.approx(memory().host / 2, rel=1e-6)
