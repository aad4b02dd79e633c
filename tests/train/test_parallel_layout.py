"""Layouts: impossible ones and ones that do not fit a model are refused; the place of each rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles.architecture.config import ModelShape
from miles.errors import ConfigError
from miles.train.config import ClusterConfig
from miles.train.parallel_layout import Layout

DENSE = ModelShape("qwen3", 6, 64, 128, 4, 2, 16, 512, 256, 1e6, 1e-6, False, True, False)
EXPERTS = replace(
    DENSE,
    model_type="qwen3_moe",
    num_layers=4,
    num_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"world_size": 3, "tensor": 2},
            "3 ranks .* cannot be divided into replicas of --tensor-model",
        ),
        ({"world_size": 4, "tensor": 0}, "--tensor-model-parallel-size must be positive, not 0"),
        (
            {"world_size": 4, "expert": 3},
            "4 ranks cannot be divided into --expert-model-parallel-size 3",
        ),
        (
            {"world_size": 2, "sequence_parallel": True},
            "--sequence-parallel spreads tokens over tensor-parallel ranks",
        ),
    ],
)
def test_an_impossible_layout_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(**arguments)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        (
            DENSE,
            Layout(4, tensor=4),
            r"key/value heads \(2\) cannot be divided by --tensor-model-parallel-size 4",
        ),
        (
            DENSE,
            Layout(4, pipeline=4),
            r"layers \(6\) cannot be divided by --pipeline-model-parallel-size 4",
        ),
        (DENSE, Layout(2, expert=2), "qwen3 has no experts to spread"),
        (
            EXPERTS,
            Layout(3, expert=3),
            r"experts \(8\) cannot be divided by --expert-model-parallel-size 3",
        ),
        (EXPERTS, Layout(2, tensor=2, expert=2), "with --sequence-parallel only"),
        (
            EXPERTS,
            Layout(2, tensor=2, sequence_parallel=True),
            "give --expert-tensor-parallel-size 2, not 1",
        ),
    ],
)
def test_an_unfit_layout_is_refused(shape: ModelShape, layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout.require_fits(shape)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"heads .*; key/value heads .*; layers"):
        Layout(64, tensor=8, pipeline=4).require_fits(DENSE)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (DENSE, Layout(12, tensor=2, pipeline=3, sequence_parallel=True)),
        (replace(DENSE, vocab_size=511), Layout(2, tensor=2)),
        (EXPERTS, Layout(8, tensor=2, pipeline=2, sequence_parallel=True, expert=2)),
        (EXPERTS, Layout(2, tensor=2, sequence_parallel=True, expert_tensor=2)),
    ],
)
def test_a_layout_that_fits_is_taken(shape: ModelShape, layout: Layout) -> None:
    layout.require_fits(shape)


def test_a_replica_reads_the_same_data() -> None:
    layout = Layout(8, tensor=2, pipeline=2)
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [layout.stage(rank) for rank in range(8)] == [0] * 4 + [1] * 4
    assert [layout.is_last_stage(rank) for rank in range(8)] == [False] * 4 + [True] * 4


def test_a_node_reads_the_data_of_its_ranks() -> None:
    layout = Layout(8, tensor=2, pipeline=2)
    by_rank = [layout.node_data_ranks(rank, 4) for rank in range(8)]
    assert by_rank == [(0, 1)] * 8
    assert [layout.node_data_ranks(rank, 2) for rank in (0, 3, 5)] == [(0,), (1,), (0,)]
    assert Layout(5).node_data_ranks(4, 3) == (3, 4), "the last node has fewer"


def test_few_ranks_hold_the_same_experts() -> None:
    spread = Layout(8, tensor=2, pipeline=2, sequence_parallel=True, expert=2)
    assert spread.expert_data == 2
    assert Layout(8, tensor=2, expert_tensor=2).expert_data == Layout(8, tensor=2).data == 4


def test_experts_follow_tensor_size_by_default() -> None:
    cluster = ClusterConfig(gpus_per_node=4, tensor=2, sequence_parallel=True)
    assert cluster.layout.expert_tensor == 2
    assert ClusterConfig(gpus_per_node=4, tensor=2, expert_tensor=1).layout.expert_tensor == 1


def test_a_node_has_only_so_many_gpus() -> None:
    with pytest.raises(ConfigError, match="--actor-num-gpus-per-node 9 is more than a machine has"):
        ClusterConfig(gpus_per_node=9)
    assert ClusterConfig(num_nodes=2, gpus_per_node=16, num_gpus_per_node=16).world_size == 32
