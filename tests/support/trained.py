"""A model, and folders that a run of it leaves: made without Ray and Megatron, in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles.architecture.adapter import TARGETS, AdapterShape
from miles.common.checkpoint_tracker import folder_name, write_tracker
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.data.config import EncodeConfig
from miles.demo.model import TinySizes, build_model
from tests.support.adapters import save_as_run
from tests.support.models import edit_tensors

SIZES = TinySizes(
    hidden_size=64,
    ffn_hidden_size=128,
    num_layers=2,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=32,
)
LORA = AdapterShape(4, 8.0, TARGETS)


def make_model(tokenizer: Path, folder: Path, scale: float = 20.0) -> Path:
    """Write a tiny Qwen3 with the files of a tokenizer beside it.

    Args:
        scale: of the weights: with those that a training begins from, each token follows itself.
    """
    build_model(tokenizer, folder, sizes=SIZES)

    def grow(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if "norm" not in name:
                tensors[name] = tensor * scale

    edit_tensors(folder, grow)
    return folder


def make_run(hf: Path, save: Path, step: int = 7, **settings: Any) -> Path:
    """Write the folder of a run whose checkpoint has the weights of a model.

    Args:
        settings: of its config.json, beside the model's folder and the encoding.
    """
    hf_to_megatron(str(hf), str(save))
    (save / "release").rename(save / folder_name(step))
    write_tracker(str(save), step)
    write_settings(hf, save, **settings)
    return save


def make_lora_run(hf: Path, save: Path) -> Path:
    """Write the folder of a LoRA run after 7 steps."""
    save_as_run(hf, save, LORA)
    write_settings(hf, save)
    return save


def write_settings(
    hf: Path, save: Path, encode: Mapping[str, Any] | None = None, **settings: Any
) -> None:
    """Write the config.json of a run."""
    config = EncodeConfig(str(hf), **(encode or {}))
    content = {
        "hf_checkpoint": str(hf),
        "save": str(save),
        "data": {"encode": asdict(config)},
        **settings,
    }
    (save / "config.json").write_text(json.dumps(content, default=str))
