"""Adapters of tiny models: as PEFT saves them, and as the checkpoint of a LoRA run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.architecture.adapter import AdapterShape, adapter_parameters
from miles.architecture.families import pieces_in, read_shape
from miles.common.checkpoint_folder import ADAPTER, EXTRA
from miles.common.checkpoint_tracker import write_tracker
from miles.convert import torch_dist
from miles.convert.torch_dist import Box

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def save_with_peft(
    hf: Path, folder: Path, *, dtype: torch.dtype, seed: int = 11, **settings: Any
) -> None:
    """Save an adapter of a model with PEFT, in which nothing is zero.

    Args:
        settings: of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)


def save_as_run(
    hf: Path, save: Path, adapter: AdapterShape, *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Write what a LoRA run's `--save` holds after 7 steps: an adapter with an optimizer's state.

    Returns:
        the adapter's tensors, by PEFT's names.
    """
    shape = read_shape(str(hf))
    generator = torch.Generator().manual_seed(12)
    tensors: dict[str, Tensor] = {}
    boxes = []
    for parameter, place in pieces_in(adapter_parameters(shape, adapter), shape):
        (name,) = parameter.hf_names(place)
        sizes = parameter.shape
        tensors[name] = (torch.randn(sizes, generator=generator) * 0.1).to(dtype)
        for key, content in (
            (parameter.megatron, tensors[name]),
            (f"optimizer.state.exp_avg.{parameter.megatron}", torch.ones(sizes)),
        ):
            boxes.append(
                Box(
                    key=key,
                    offsets=(*place, *(0 for _ in sizes)),
                    sizes=(1, *sizes),
                    size=(shape.num_layers, *sizes),
                    dtype=content.dtype,
                    make=partial(Tensor.clone, content),
                )
            )

    folder = save / "iter_0000007"
    folder.mkdir(parents=True)
    places = torch_dist.write_boxes(folder, "__0_0.distcp", boxes, lambda num_bytes: None)
    args = shape.checkpoint_args(padded_vocab_size=shape.vocab_size)
    torch_dist.write_metadata(folder, list(zip(boxes, places, strict=True)), args)
    extra = {"cursor": {}, ADAPTER: adapter.to_json()}
    (folder / EXTRA).write_text(json.dumps(extra))
    write_tracker(str(save), 7)
    return tensors
