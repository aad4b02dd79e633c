"""The estimate of memory, against real ranks on every layout and against what autograd keeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miles.architecture.adapter import (
    ATTENTION_TARGETS,
    TARGETS,
    AdapterShape,
    total_adapter_parameters,
)
from miles.architecture.config import ModelShape
from miles.architecture.families import shape_of
from miles.architecture.sizes import (
    active_parameters,
    key_size,
    total_parameters,
)
from miles.train.compute_config import ComputeConfig
from miles.train.estimate.memory import Training, estimate
from miles.train.model import process_groups
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig
from miles.train.types import AdapterSettings
from tests.support.kept_activations import Way, more_on_a_cpu, saved
from tests.support.ranks import batch, run_ranks, start, trainer_settings

DENSE = ModelShape("qwen3", 4, 64, 160, 4, 2, 16, 512, 256, 1e6, 1e-6, True, True, False)
UNTIED = replace(
    DENSE,
    model_type="qwen2",
    tied_embeddings=False,
    qk_layernorm=False,
    add_qkv_bias=True,
    vocab_size=513,  # two tensor-parallel ranks need a row of padding
)
EXPERTS = replace(
    UNTIED,
    model_type="qwen3_moe",
    qk_layernorm=True,
    add_qkv_bias=False,
    num_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
)

LAYOUTS = {
    1: [Layout(1)],
    2: [
        Layout(2),
        Layout(2, tensor=2),
        Layout(2, pipeline=2),
        Layout(2, tensor=2, sequence_parallel=True),
    ],
    4: [Layout(4), Layout(4, tensor=2, pipeline=2), Layout(4, tensor=2), Layout(4, pipeline=2)],
}
EXPERT_LAYOUTS = {
    1: [Layout(1)],
    2: [
        Layout(2, expert=2),
        Layout(2),
        Layout(2, tensor=2, sequence_parallel=True, expert_tensor=2),
    ],
    4: [
        Layout(4, tensor=2, sequence_parallel=True, expert=2),
        Layout(4, pipeline=2, expert=2),
        Layout(4, expert=2),
        Layout(4, tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
    ],
}

ALL_LINEAR = AdapterSettings(AdapterShape(8, 16.0, TARGETS), dropout=0.0, seed=1)
SOME = AdapterSettings(AdapterShape(4, 8.0, ("q_proj", "v_proj", "down_proj")), 0.0, 1)
ATTENTION = AdapterSettings(AdapterShape(8, 16.0, ATTENTION_TARGETS), dropout=0.0, seed=1)

Job = tuple[ModelShape, Layout, Precision, AdapterSettings | None]
"""Model, layout, precision, adapters."""


def held(layout: Layout, rank: int, meeting: Path, jobs: list[Job]) -> list[dict[str, int]]:
    """Return the bytes of weights, gradients and optimizer state after a step, for each job."""
    from miles.train.rank.trainer import Trainer

    counted = []
    for number, (shape, of_job, precision, lora) in enumerate(jobs):
        start(of_job, rank, meeting.with_name(f"meeting-{number}"))
        trainer = Trainer(trainer_settings(shape, of_job, precision=precision, lora=lora), rank)
        report, micro_batches = batch(0, of_job)
        trainer.train_step(report, micro_batches[of_job.data_rank(rank)])
        buffers = [*trainer.model.buffers, *trainer.model.expert_parallel_buffers]
        states = []
        for optimizer in trainer.optimizer.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                states += state.values()
            if precision is Precision.BF16:  # the masters
                for group in optimizer.shard_fp32_from_float16_groups:
                    states += group
        weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.gpt.parameters()}
        own = {
            value.untyped_storage().data_ptr(): value.nbytes
            for value in states
            if torch.is_tensor(value)
        }
        assert not weights & own.keys(), "no state is a view of a weight"
        counted.append(
            {
                "weights": sum(parameter.nbytes for parameter in trainer.gpt.parameters()),
                "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
                "optimizer": sum(value.nbytes for value in states if torch.is_tensor(value)),
                "stage": of_job.stage(rank),
            }
        )
        process_groups.shutdown()
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_estimate_is_what_ranks_hold(world: int) -> None:
    jobs: list[Job] = []
    for shape, layouts in (
        (DENSE, LAYOUTS[world]),
        (UNTIED, LAYOUTS[world]),
        (EXPERTS, EXPERT_LAYOUTS[world]),
    ):
        jobs += [(shape, layout, Precision.FP32, None) for layout in layouts]
    jobs += [(UNTIED, layout, Precision.BF16, None) for layout in LAYOUTS[world][:2]]
    jobs.append((EXPERTS, EXPERT_LAYOUTS[world][0], Precision.BF16, None))
    jobs += [(DENSE, layout, Precision.BF16, ALL_LINEAR) for layout in LAYOUTS[world][:2]]
    jobs.append((UNTIED, LAYOUTS[world][-1], Precision.FP32, SOME))
    jobs.append((EXPERTS, EXPERT_LAYOUTS[world][0], Precision.BF16, ATTENTION))

    by_rank = run_ranks(held, Layout(world), jobs)
    for number, (shape, layout, precision, lora) in enumerate(jobs):
        stages = estimate(
            shape,
            layout,
            Training(precision=precision, adapter=lora and lora.adapter),
            max_tokens_per_gpu=64,
        )
        for counted in (of_rank[number] for of_rank in by_rank):
            stage = stages[counted["stage"]]
            where = f"{shape.model_type} {layout} {precision} {lora}: {counted} against {stage}"
            assert stage.weights == counted["weights"], where
            assert stage.gradients == pytest.approx(counted["gradients"], rel=0.1), where
            # Ranks divide the buffer, not the parameters: one may have a few more than its share.
            assert stage.optimizer == pytest.approx(counted["optimizer"], rel=0.1), where
            together = counted["weights"] + counted["optimizer"]
            assert stage.weights + stage.optimizer == pytest.approx(together, rel=0.1), where


@pytest.mark.slow
def test_activations_are_what_autograd_keeps() -> None:
    num_tokens = 200
    larger = [
        replace(
            shape, hidden_size=256, ffn_hidden_size=640, kv_channels=64, moe_ffn_hidden_size=width
        )
        for shape, width in ((DENSE, 0), (UNTIED, 0), (EXPERTS, 128))
    ]
    # The kernel that norms and rotates the heads keeps other values, and is for GPUs only.
    plain_heads = ComputeConfig(rope_fusion=False)
    grouped = replace(plain_heads, grouped_experts=True)
    ways: list[Way] = [(shape, grouped, None) for shape in larger]
    plain_gates = replace(plain_heads, swiglu_fusion=False)
    for plain in (plain_heads, plain_gates):
        ways.append((larger[-1], replace(plain, grouped_experts=False), None))
    ways.append((larger[0], plain_gates, None))
    # What has as many rows as the vocabulary is taken for logits: here, linear_qkv would have.
    adapted = replace(larger[0], vocab_size=520)
    ways += [(adapted, grouped, ALL_LINEAR), (larger[1], grouped, SOME)]

    (counted,) = run_ranks(saved, Layout(1), ways, num_tokens)
    for (shape, compute, lora), size in zip(ways, counted, strict=True):
        (stage,) = estimate(
            shape,
            Layout(1),
            Training(precision=Precision.FP32, compute=compute, adapter=lora and lora.adapter),
            max_tokens_per_gpu=num_tokens,
        )
        expected = stage.activations + more_on_a_cpu(shape, lora) * num_tokens * 4
        where = f"{shape.model_type} {compute} {lora}: {expected} against {size}"
        assert expected == pytest.approx(size, rel=0.005), where


def activations(layout: Layout, recompute: RecomputeConfig = KEEP_ALL) -> list[int]:
    stages = estimate(
        DENSE,
        layout,
        Training(precision=Precision.BF16, recompute=recompute),
        max_tokens_per_gpu=64,
    )
    return [stage.activations for stage in stages]


def test_activations_by_layout_and_recomputation() -> None:
    (one,) = activations(Layout(1))
    stages = activations(Layout(4, pipeline=4))
    last_norm = DENSE.hidden_size * 64 * 2 + 64 * 4
    each = stages[-1] - last_norm
    assert stages == [4 * each, 3 * each, 2 * each, each + last_norm], "stages ahead keep more"
    (tensor,) = activations(Layout(2, tensor=2))
    (sequence,) = activations(Layout(2, tensor=2, sequence_parallel=True))
    rotation = 64 * 2 * DENSE.kv_channels * 4  # cosine and sine, on each tensor-parallel rank
    assert (one + rotation) / 2 == pytest.approx(sequence, rel=0.001)
    assert sequence < tensor < one

    (uniform,) = activations(Layout(1), RecomputeConfig("full", "uniform", 1))
    (block,) = activations(Layout(1), RecomputeConfig("full", "block", 2))
    entry = DENSE.hidden_size * 64 * 2
    shared = entry + 64 * 4 + 64 * 2 * DENSE.kv_channels * 4  # the last norm; cosine and sine
    layer = (one - shared) // 4
    assert uniform == 4 * entry + layer + shared
    assert block == 2 * entry + 2 * layer + layer + shared
    assert activations(Layout(1), RecomputeConfig("selective")) == [one], (
        "flash attention keeps no scores"
    )


def test_experts_are_grouped_in_bfloat16_only() -> None:
    def activated(precision: Precision, is_grouped: bool | None) -> int:
        compute = ComputeConfig(grouped_experts=is_grouped)
        (stage,) = estimate(
            EXPERTS,
            Layout(1),
            Training(precision=precision, compute=compute),
            max_tokens_per_gpu=64,
        )
        return stage.activations

    assert activated(Precision.BF16, None) == activated(Precision.BF16, True)
    for precision in (Precision.FP32, Precision.FP16):
        assert activated(precision, None) == activated(precision, False)
    assert activated(Precision.BF16, None) < activated(Precision.FP16, None)


def test_the_kernel_of_the_heads_keeps_the_projection() -> None:
    def kept(shape: ModelShape, compute: ComputeConfig) -> int:
        (stage,) = estimate(
            shape,
            Layout(1),
            Training(precision=Precision.BF16, compute=compute),
            max_tokens_per_gpu=64,
        )
        return stage.activations

    plain = ComputeConfig(norm_fusion=False)
    # A value more for each channel of a key; no number for each of 6 heads.
    more = key_size(DENSE) * 2 - 6 * 4
    assert kept(DENSE, ComputeConfig()) - kept(DENSE, plain) == 64 * DENSE.num_layers * more
    assert kept(UNTIED, ComputeConfig()) == kept(UNTIED, plain), "no norms on its heads"


def test_the_loss_takes_pieces_of_the_logits() -> None:
    def loss(shape: ModelShape, layout: Layout, chunk_size: int, is_fused: bool = True) -> int:
        stages = estimate(
            shape,
            layout,
            Training(
                precision=Precision.BF16,
                compute=ComputeConfig(loss_chunk_size=chunk_size, loss_fusion=is_fused),
            ),
            max_tokens_per_gpu=4096,
        )
        return stages[-1].loss

    hidden = 4096 * 64 * 2
    assert loss(DENSE, Layout(1), 0) == 4096 * 512 * 10, "the logits of all tokens"
    assert loss(DENSE, Layout(1), 1024) == hidden + 1024 * 512 * 2
    assert loss(DENSE, Layout(1), 1024, is_fused=False) == hidden + 1024 * 512 * 6
    assert loss(DENSE, Layout(1), 9999) == hidden + 4096 * 512 * 2
    assert loss(DENSE, Layout(2, tensor=2), 2048) == hidden + 2048 * 512 * 2 // 2

    # In small pieces, what is handed to the backward pass is more.
    assert loss(DENSE, Layout(1), 1) == 2 * hidden
    untied = replace(DENSE, tied_embeddings=False)
    assert loss(untied, Layout(1), 1) == 2 * hidden + 512 * 64 * 2
    assert loss(DENSE, Layout(2, pipeline=2), 1) == loss(untied, Layout(1), 1)


QWEN3_4B = ModelShape(
    "qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 40960, 1e6, 1e-6, True, True, False
)
QWEN3_235B = ModelShape(
    "qwen3_moe",
    94,
    4096,
    12288,
    64,
    4,
    128,
    151936,
    40960,
    1e6,
    1e-6,
    False,
    True,
    False,
    None,
    128,
    8,
    1536,
)


def test_known_models_have_their_parameters() -> None:
    assert total_parameters(QWEN3_4B) == active_parameters(QWEN3_4B) == 4_022_468_096
    assert total_parameters(QWEN3_235B) == 235_093_634_560
    assert round(active_parameters(QWEN3_235B) / 1e9) == 22


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_transformers_counts_the_same_parameters(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.models import EXPERTS as MOE
    from tests.support.models import SIZES

    more = MOE if model_type == "qwen3_moe" else {}
    config = AutoConfig.for_model(
        model_type, vocab_size=192, tie_word_embeddings=False, **SIZES, **more
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(json.loads(config.to_json_string()), "there")
    assert total_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_the_docs_example_is_computed() -> None:
    text = (Path(__file__).parents[3] / "docs/memory.md").read_text().split("## LoRA")[0]
    (stage,) = estimate(
        QWEN3_4B,
        Layout(8, tensor=2, sequence_parallel=True),
        Training(precision=Precision.BF16, recompute=RecomputeConfig("full", "uniform", 1)),
        max_tokens_per_gpu=9216,
    )
    for name in ("weights", "gradients", "optimizer", "activations", "loss", "total"):
        (gib,) = re.findall(rf"^\| {name} \|.*\| ([\d.]+) \|$", text, re.MULTILINE)
        assert float(gib) == round(getattr(stage, name) / 2**30, 2), name


def test_the_docs_lora_table_is_computed() -> None:
    """Each row of the table: all weights trained, and adapters of rank 16 on all projections."""
    text = (Path(__file__).parents[3] / "docs/memory.md").read_text()
    section = text.split("## LoRA")[1]

    whole, adapted = (
        estimate(
            QWEN3_4B,
            Layout(1),
            Training(
                precision=Precision.BF16,
                recompute=RecomputeConfig("full", "uniform", 1),
                adapter=adapter,
            ),
            max_tokens_per_gpu=9216,
        )[0]
        for adapter in (None, AdapterShape(16, 32.0, TARGETS))
    )
    assert f"{adapted.num_trained:,}" in section
    assert adapted.num_trained == total_adapter_parameters(
        QWEN3_4B, AdapterShape(16, 32.0, TARGETS)
    )
    for name in ("weights", "gradients", "optimizer", "activations", "loss", "total"):
        row = rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \|$"
        ((of_whole, of_adapter),) = re.findall(row, section, re.MULTILINE)
        assert float(of_whole) == round(getattr(whole, name) / 2**30, 2), name
        assert float(of_adapter) == round(getattr(adapted, name) / 2**30, 2), name
