"""Qwen3-235B-A22B's layout with 4 ranks for 32, against what ranks hold, keep and save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.architecture.config import ModelShape
from miles.architecture.sizes import total_parameters
from miles.train.compute_config import ComputeConfig
from miles.train.estimate.memory import Training, estimate
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from tests.support.kept_activations import more_on_a_cpu, saved
from tests.support.ranks import batch, run_ranks, start, trainer_settings

SHAPE = ModelShape(
    "qwen3_moe",
    4,
    256,
    160,
    4,
    2,
    64,
    1028,
    256,
    1e6,
    1e-6,
    False,
    True,
    False,
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=128,
)
LAYOUT = Layout(4, tensor=2, sequence_parallel=True, expert=4)
"""Each expert is there once, the rest in two halves and twice."""
OFFLOADED = OptimizerSettings(precision_aware=True, cpu_offload=True)


@contextlib.contextmanager
def forks_left_out() -> Iterator[list[int]]:
    """Yield the bytes of the tensors that each fork in the context is left without."""
    from miles.train.rank import writer_processes

    leave_out = writer_processes.left_out_of_forks
    left_out: list[int] = []

    def counted(tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        own = list(tensors)
        left_out.append(sum(tensor.nbytes for tensor in own))
        return leave_out(own)

    writer_processes.left_out_of_forks = counted
    try:
        yield left_out
    finally:
        writer_processes.left_out_of_forks = leave_out


def scaled_down(layout: Layout, rank: int, meeting: Path) -> dict[str, int]:
    """Return the bytes of a rank after a step with offloading, and what a save takes of them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.optimizer_state import host_tensors
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    settings = replace(
        trainer_settings(SHAPE, layout, precision=Precision.BF16), optimizer=OFFLOADED
    )
    trainer = Trainer(settings, rank)
    report, micro_batches = batch(0, layout)
    trainer.train_step(report, micro_batches[layout.data_rank(rank)])

    host = list(host_tensors(trainer.optimizer))
    for part in trainer.optimizer.chained_optimizers:
        host += part.optimizer.cpu_copy_map_grad.values()
    own = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in host}
    buffers = [*trainer.model.buffers, *trainer.model.expert_parallel_buffers]

    state = checkpoint_load.state_to_save(trainer, 1, {})
    written = shared = 0
    for value in nested_values(state["optimizer"]):
        data: Any = getattr(value, "data", None)
        if torch.is_tensor(data) and is_main_replica(value.replica_id):
            written += data.nbytes
            shared += data.untyped_storage().nbytes() - data.nbytes
    with forks_left_out() as left_out:
        checkpoint_writer.save(trainer, str(meeting.parent / "save"), 1, {})
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.gpt.parameters()),
        "weights": sum(parameter.nbytes for parameter in trainer.gpt.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "host": sum(own.values()),
        "written": written,
        "shared": shared,
        "masters and moments": sum(tensor.nbytes for tensor in host_tensors(trainer.optimizer)),
        "left out": min(left_out),
        "forks": len(left_out),
    }


@pytest.mark.slow
def test_the_estimate_is_what_ranks_hold_and_save() -> None:
    (stage,) = estimate(SHAPE, LAYOUT, Training(Precision.BF16, optimizer=OFFLOADED), 64)
    by_rank = run_ranks(scaled_down, LAYOUT)
    for counted in by_rank:
        assert counted["parameters"] == stage.num_parameters
        assert counted["weights"] == stage.weights
        assert counted["gradients"] == pytest.approx(stage.gradients, rel=0.01)
        assert counted["shared"] == 0, "what is written is no view: a save has it once"
        # The process of the results, and the writer.
        assert counted["forks"] == 2
        assert counted["left out"] == counted["masters and moments"]
    assert sum(counted["host"] for counted in by_rank) == pytest.approx(4 * stage.host, rel=0.01)

    # Each parameter is written once: a master and two moments. A save gathers no less than that.
    written = [counted["written"] for counted in by_rank]
    assert sum(written) == 12 * total_parameters(SHAPE)
    assert max(written) < stage.host_saving


@pytest.mark.slow
def test_activations_of_spread_experts_are_what_autograd_keeps() -> None:
    num_tokens = 200
    compute = ComputeConfig(rope_fusion=False, grouped_experts=True)
    (stage,) = estimate(SHAPE, LAYOUT, Training(Precision.FP32, compute=compute), num_tokens)
    by_rank = run_ranks(saved, LAYOUT, [(SHAPE, compute, None)], num_tokens)

    # An expert's tokens differ from rank to rank; all ranks together have 2 copies of each. What a
    # CPU keeps beside them is not divided by 2 to the last value. Twice the copies would be a third
    # more.
    expected = stage.activations + more_on_a_cpu(SHAPE, None) * num_tokens * 4 / 2
    assert sum(sizes[0] for sizes in by_rank) == pytest.approx(4 * expected, rel=0.06)
