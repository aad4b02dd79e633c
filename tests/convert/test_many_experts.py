"""The experts of Qwen3-235B-A22B in half of its layers, all of them tiny: a few tensors at a time.

The 18,500 tensors lie in twelve files; the 37,000 of the real model in 118.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles.architecture.families import hf_shapes, shape_of
from miles.convert.safetensors_files import Spec, index_text
from miles.convert.safetensors_headers import INDEX
from miles.convert.torch_dist import Checkpoint
from tests.support.launch import QWEN3_235B
from tests.support.models import require_same_files
from tests.support.processes import PROJECT

LAYERS, EXPERTS, HIDDEN, WIDTH = 47, 128, 64, 32
NUM_FILES = 12

TINY = {
    **QWEN3_235B,
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "head_dim": 8,
    "moe_intermediate_size": 32,
    "vocab_size": 160,
}
BOTH_WAYS = """
import sys
from pathlib import Path
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

source, megatron, back = sys.argv[1:]
before = peak()
hf_to_megatron(source, megatron)
megatron_to_hf(megatron, source, back)
print(peak() - before)
"""
"""Converts in a process of its own, and prints the bytes by which that grew."""


def write_model(folder: Path) -> int:
    """Write the Hugging Face checkpoint, with other numbers in each tensor; return its bytes."""
    shapes = hf_shapes(shape_of(TINY, ""))
    names = sorted(shapes)
    files: dict[str, str] = {}
    generator = torch.Generator().manual_seed(5)
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors"
        own = names[number::NUM_FILES]
        sizes = [math.prod(shapes[name]) for name in own]
        parts = torch.rand(sum(sizes), generator=generator).split(sizes)
        tensors = {
            name: part.view(shapes[name]).clone() for name, part in zip(own, parts, strict=True)
        }
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(own, file)

    specs = {name: Spec(torch.float32, sizes) for name, sizes in shapes.items()}
    (folder / INDEX).write_text(index_text(specs, files))
    (folder / "config.json").write_text(json.dumps(TINY))
    return sum(spec.num_bytes for spec in specs.values())


@pytest.mark.slow
def test_all_experts_there_and_back_a_few_at_a_time(tmp_path: Path) -> None:
    source, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    source.mkdir()
    num_bytes = write_model(source)
    words = [sys.executable, "-c", BOTH_WAYS, str(source), str(megatron), str(back)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT, check=True)

    # Most of it is the account of 12,000 boxes, which does not grow with their sizes.
    assert int(done.stdout) < 0.6 * num_bytes, f"{int(done.stdout):,} of {num_bytes:,} bytes"
    require_same_files(source, back)
    require_every_expert(source, Checkpoint(megatron / "release", str(megatron)))


def require_every_expert(source: Path, checkpoint: Checkpoint) -> None:
    """Assert that the experts of some layers are what Megatron takes them for."""
    prefix = "decoder.layers.mlp.experts.experts"
    first, second = f"{prefix}.linear_fc1.weight", f"{prefix}.linear_fc2.weight"
    assert checkpoint.tensors[first].size == (LAYERS, EXPERTS, 2 * WIDTH, HIDDEN)
    assert checkpoint.tensors[second].size == (LAYERS, EXPERTS, HIDDEN, WIDTH)
    assert checkpoint.tensors["decoder.layers.mlp.router.weight"].size == (LAYERS, EXPERTS, HIDDEN)

    weights = {}
    for file in source.glob("*.safetensors"):
        weights |= load_file(file)
    for layer in (0, LAYERS - 1):
        for expert in range(EXPERTS):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up, down = (
                weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            place = (layer, expert, 0, 0)
            found = checkpoint.read(first, place, torch.empty(1, 1, 2 * WIDTH, HIDDEN))
            assert torch.equal(found[0, 0], torch.cat([gate, up])), name
            found = checkpoint.read(second, place, torch.empty(1, 1, HIDDEN, WIDTH))
            assert torch.equal(found[0, 0], down), name
