"""Walk the trainer's GPU path without a GPU: every tensor has a shape, a type and a place, no value.

    python benchmarks/fake_cuda.py --family qwen3 --layout one data

Needs a CUDA build of PyTorch on Linux, triton, gcc, megatron-core and liger-kernel, and no GPU; it
is run by hand. For each family and layout it builds a model of full width and two layers, trains
two steps, evaluates and generates, through the same `Trainer` as a run. It shows

    faults    a tensor on the wrong device, shapes and types that do not fit, an API that is missing
    waits     the host waits for the GPU: `.item()`, masks as indices, copies that are not pinned
    kept      what autograd keeps, by type: float32 should not be much of it
    kernels   their number, and those that move most bytes
    Triton    the kernels that were called, compiled for sm_90: registers, shared memory, spills

Numbers, speed and memory it cannot show. Exit status 1 where there is a fault, or a wait in a step
that is not one of `ALLOWED_WAITS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _fake_device import build_stubs, fake_device
from _gpu_models import SHAPES

from miles.architecture.config import ModelShape
from miles.data.packing.micro_batch import micro_batch
from miles.data.types import (
    MicroBatch,
    StepContent,
    StepPacking,
    StepPosition,
    StepReport,
    StepRows,
    StepTiming,
)
from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import RecomputeConfig
from miles.train.types import TrainerSettings

if TYPE_CHECKING:
    from _fake_watch import Watch

QWEN3 = dataclasses.replace(SHAPES["qwen3-4b"], num_layers=2)
FAMILIES = {
    "qwen3": QWEN3,
    "qwen2": dataclasses.replace(
        QWEN3,
        model_type="qwen2",
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        tied_embeddings=False,
        qk_layernorm=False,
        add_qkv_bias=True,
    ),
    "llama": dataclasses.replace(
        QWEN3,
        model_type="llama",
        hidden_size=4096,
        ffn_hidden_size=14336,
        vocab_size=128256,
        rotary_base=5e5,
        tied_embeddings=False,
        qk_layernorm=False,
        rope_scaling_factor=8.0,
    ),
    "qwen3_moe": dataclasses.replace(SHAPES["qwen3-30b-a3b"], num_layers=2),
}
"""The widths of Qwen3-4B, Qwen2.5-7B, Llama-3.1-8B and Qwen3-30B-A3B."""
LAYOUTS = {
    "one": Layout(1),
    "data": Layout(2),
    "tensor": Layout(2, tensor=2, sequence_parallel=True),
    "pipeline": Layout(2, pipeline=2),
    "expert": Layout(2, expert=2),
}
SEGMENTS = ((1000, 6300, 700, 192), (2500, 2500, 2500, 500, 150, 42))
"""Lengths of the samples of each micro-batch, of 8,192 tokens; one is long enough for cuDNN."""
NUM_TOKENS = 8192

ALLOWED_WAITS = (
    ("loss.py", "the sums of a step, and with them the end of its last micro-batch"),
    ("generate.py", "the tokens that were chosen"),
    ("clip_grads.py", "the gradient's norm"),
    ("token_dispatch.py", "how many tokens the experts of other ranks get"),
    ("p2p_communication.py", "the length of the next micro-batch, between pipeline stages"),
)
"""The files that may wait for the GPU in a step, and for what."""


def main() -> None:
    flags = _flags()
    if "LD_PRELOAD" not in os.environ:
        # The stubs must be there before PyTorch is loaded.
        changes = build_stubs(flags.folder)
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **changes})  # noqa: S606
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)

    num_faults = 0
    for layout_name in flags.layout:
        for family in flags.family:
            shape, layout = FAMILIES[family], LAYOUTS[layout_name]
            if layout.expert > 1 and shape.num_experts is None:
                continue
            if layout.tensor > 1 and shape.num_experts is not None:
                layout = dataclasses.replace(layout, expert_tensor=layout.tensor)
            for rank in range(layout.pipeline):
                title = f"{family}, {layout_name}, rank {rank * layout.data * layout.tensor}"
                for name, settings in _settings(shape, layout, flags).items():
                    print(f"\n===== {title}{name}", flush=True)
                    num_faults += _walk(settings, rank * layout.data * layout.tensor, flags.top)
    print(f"\n{num_faults} faults")
    sys.exit(1 if num_faults else 0)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--switches", action="store_true", help="each switch off in turn, too")
    parser.add_argument("--top", type=int, default=12, help="kernels to show")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir(), "miles-fake-cuda"),
        help="for the stubs of CUDA's libraries",
    )
    return parser.parse_args()


def _settings(
    shape: ModelShape, layout: Layout, flags: argparse.Namespace
) -> dict[str, TrainerSettings]:
    """Return the settings to walk with, by what is particular about each."""
    plain = TrainerSettings(shape, layout, OptimizerSettings(), 10, 1, Precision.BF16)
    settings = {"": plain}
    if not flags.switches:
        return settings

    recompute = RecomputeConfig("full", "uniform", 1)
    settings[", recomputed"] = dataclasses.replace(plain, recompute=recompute)
    for name, compute in switched_off().items():
        settings[f", no {name}"] = dataclasses.replace(plain, compute=compute)
    return settings


def switched_off() -> dict[str, ComputeConfig]:
    """Return the usual way with each of its switches off in turn, by the switch's name."""
    off = {}
    for field in dataclasses.fields(ComputeConfig):
        if "bool" in str(field.type).split(",")[0]:
            off[field.name] = dataclasses.replace(AS_USUAL, **{field.name: False})
    off["loss_chunk_size"] = dataclasses.replace(AS_USUAL, loss_chunk_size=0)
    return off


def _walk(settings: TrainerSettings, rank: int, top: int) -> int:
    """Walk through a trainer's work, and print what there is to see. Returns the faults' number."""
    from _fake_triton import compiled_only
    from _fake_watch import Watch, own_traceback

    from miles.train.model import process_groups

    watch = Watch(_known_lists(settings))
    num_faults = 0
    with compiled_only(watch.note_launch) as compiled, fake_device(watch):
        try:
            num_faults += _train(settings, rank, watch, top)
        except Exception as error:
            print(f"FAULT: {own_traceback(error)}")
            num_faults += 1
        finally:
            process_groups.shutdown()
    for kernel in compiled.values():
        print(f"  triton {kernel}")
    return num_faults


def _train(settings: TrainerSettings, rank: int, watch: Watch, top: int) -> int:
    """Build a trainer; train, evaluate and generate. Returns the number of faults."""
    import torch

    from miles.train.model import process_groups
    from miles.train.model.device_batch import send
    from miles.train.model.packed_forward import forward_packed
    from miles.train.rank.trainer import Trainer

    process_groups.initialize(settings.layout, rank, "tcp://127.0.0.1:0", 7, 1)
    trainer = Trainer(settings, rank)
    _show("built", watch, top=3)

    batches = [_micro_batch(lengths) for lengths in SEGMENTS]
    if settings.layout.pipeline == 1:
        # Beside the step: a hook gets weights without the marks that Megatron's DDP needs.
        with torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda value: value):
            forward_packed(trainer.gpt, send(batches[0]), with_labels=True)
        _show("forward pass of a micro-batch", watch, top)

    num_faults = 0
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        trainer.train_step(_report(), batches)
        _show("first step", watch, top=0)
        # The first one also makes the optimizer's state.
        trainer.train_step(_report(), batches)
        num_faults += _show("second step", watch, top)

    trainer.evaluate([batches], 1)
    num_faults += _show("evaluation", watch, top=3)
    trainer.generate([range(NUM_TOKENS), range(NUM_TOKENS)], {7}, 1)
    num_faults += _show("generation", watch, top=3)
    return num_faults


def _show(title: str, watch: Watch, top: int) -> int:
    """Print the findings since the last call. Returns how many kinds of waits are not allowed."""
    found = watch.found
    watch.found = type(found)()
    gib = sum(found.kernel_bytes.values()) / 2**30
    print(f"{title}: {sum(found.kernels.values()):,} kernels, {gib:.1f} GiB read or written")

    num_wrong = 0
    for where, count in found.waits.most_common():
        allowed = [why for file, why in ALLOWED_WAITS if f"/{file}:" in where]
        num_wrong += not allowed
        print(f"  {'wait' if allowed else 'WAIT'} {count:4} {where}")
    for dtype, kept in found.kept_bytes.items():
        if sum(kept.values()) < 1 << 20:
            continue
        print(f"  kept {sum(kept.values()) / 2**20:10,.1f} MiB of {dtype}")
        for where, num_bytes in kept.most_common(8):
            print(f"       {num_bytes / 2**20:10,.1f} {where}")
    for where, num_bytes in found.kernel_bytes.most_common(top):
        print(f"  {num_bytes / 2**30:8.2f} GiB in {found.kernels[where]:4} {where}")
    return num_wrong


def _micro_batch(lengths: Sequence[int]) -> MicroBatch:
    """Return a micro-batch of samples of these lengths, of which every second token is trained."""
    num_tokens = sum(lengths)
    return micro_batch(
        np.arange(num_tokens, dtype=np.int32),
        (np.arange(num_tokens) % 2).astype(np.uint8),
        np.array(lengths, np.int32),
        np.arange(len(lengths), dtype=np.int64),
        np.zeros(len(lengths), np.int32),
    )


def _report() -> StepReport:
    """Return the report of a step with 1 trained token, which is what the fake device counts."""
    content = StepContent(
        num_samples=10,
        num_tokens=NUM_TOKENS * len(SEGMENTS),
        num_causal_pairs=0,
        num_trained_tokens=1,
        source_trained_tokens=(1,),
        num_straddling_tokens=0,
        fingerprint="",
    )
    rows = StepRows(read=(10,), truncated=(0,), held_out=(0,), rejects=())
    return StepReport(StepPosition(0, 0.0, 0), rows, content, StepPacking(1.0, 1.0), StepTiming({}))


def _known_lists(settings: TrainerSettings) -> dict[int, list[int]]:
    """Return the lists that are asked of the GPU where a switch is off, by their length."""
    shape, layout = settings.shape, settings.layout
    num_rows = NUM_TOKENS // (layout.tensor if layout.sequence_parallel else 1)
    # The shape that a pipeline stage announces to the next.
    known: dict[int, list[Any]] = {3: [num_rows, 1, shape.hidden_size]}
    for lengths in (*SEGMENTS, (NUM_TOKENS,)):
        known[len(lengths)] = list(lengths)
        known[len(lengths) + 1] = [0, *np.cumsum(lengths).tolist()]
    if shape.num_experts is not None:
        num_each = NUM_TOKENS * shape.moe_router_topk // shape.num_experts
        known[shape.num_experts] = [num_each] * shape.num_experts
        num_copies = num_rows * shape.moe_router_topk
        known[layout.expert_tensor] = [num_copies] * layout.expert_tensor
        known[layout.expert] = [num_copies // layout.expert] * layout.expert
    return known


if __name__ == "__main__":
    main()
