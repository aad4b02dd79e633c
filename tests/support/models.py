"""Tiny Hugging Face models of every family, with random weights in which nothing is zero or one."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
"""Of a model that can be cut into two by tensor and by pipeline parallelism."""

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_hf(
    folder: Path,
    model_type: str,
    *,
    tied: bool,
    vocab_size: int = 192,
    dtype: torch.dtype = torch.float32,
    std: float = 0.1,
    seed: int = 5,
) -> Path:
    """Write a model of a family; the same arguments give the same weights.

    Args:
        model_type: of `miles.architecture.config.FAMILIES`.
        tied: whether the output layer is the embedding.
        std: of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    of_family = {"qwen3_moe": EXPERTS, "llama": {"rope_parameters": LLAMA3_ROPE}}.get(
        model_type, {}
    )
    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, tie_word_embeddings=tied, **SIZES, **of_family
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:  # norms that do something
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a model in one file: `change` gets and alters their dictionary."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def require_same_files(left: Path, right: Path) -> None:
    """Assert that two folders hold the same files, byte for byte."""
    names = {path.relative_to(left) for path in left.rglob("*") if path.is_file()}
    assert names == {path.relative_to(right) for path in right.rglob("*") if path.is_file()}
    for name in sorted(names):
        assert filecmp.cmp(left / name, right / name, shallow=False), name
