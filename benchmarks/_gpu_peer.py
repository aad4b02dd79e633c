"""The peer of the training step: the same model by transformers, trained on the same tokens.

    weights in bfloat16, gradients summed in bfloat16
        -> float32 copy -> norm, clipped -> torch's fused AdamW on float32 weights -> bfloat16

Micro-batches are packed without padding. Nothing is recomputed. The loss is divided by the trained
tokens of the step. Three ways, the fastest first:

- liger: Liger's kernels for norms, rotation, SwiGLU and the output layer with the loss, and torch's
  variable-length attention, registered with transformers
- varlen: the same attention, the rest as transformers has it
- sdpa: transformers as it is, with a mask that keeps the samples apart

`torch.compile` is not used: it takes minutes.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _gpu_batches import MadeUpStep
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.data.types import MicroBatch
from miles.train.model import device

WAYS = ("liger", "varlen", "sdpa")
NOT_TRAINED = -100
_VARLEN = "varlen_of_torch"


class Peer:
    """A model of transformers with its optimizer.

    Args:
        way: one of `WAYS`.
    """

    def __init__(self, shape: ModelShape, way: str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(_VARLEN, _attend)
        with torch.device(device.torch_device()):
            self.model = AutoModelForCausalLM.from_config(
                hugging_face_config(shape),
                dtype=torch.bfloat16,
                attn_implementation="sdpa" if way == "sdpa" else _VARLEN,
            )
        self._module = sys.modules[type(self.model).__module__]
        self._content = dict(vars(self._module))
        if way == "liger":
            from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model)
        self.model.config.use_cache = False
        self.model.train()

        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float() for p in self.parameters]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, weight_decay=0.1, fused=True)

    def train_step(self, step: MadeUpStep) -> float:
        """Train on the micro-batches of a step; return the loss."""
        num_trained = step.report.content.num_trained_tokens
        losses = []
        for batch in step.micro_batches:
            loss = self._loss(batch, num_trained)
            loss.backward()
            losses.append(loss.detach())

        with torch.no_grad():
            gradients = [master.grad for master in self.masters]
            torch._foreach_copy_(gradients, [p.grad for p in self.parameters])
            torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
            self.optimizer.step()
            torch._foreach_copy_(self.parameters, self.masters)
            torch._foreach_zero_([p.grad for p in self.parameters])
        return float(torch.stack(losses).sum())

    def close(self) -> None:
        """Take back what Liger has replaced in transformers' module."""
        vars(self._module).update(self._content)

    def _loss(self, batch: MicroBatch, num_trained: int) -> Tensor:
        labels = np.where(batch.loss_mask > 0, batch.labels, NOT_TRAINED)
        cu_seqlens = torch.from_numpy(batch.cu_seqlens.copy()).to(device.torch_device())
        longest = int(np.diff(batch.cu_seqlens).max())
        row = _to_device(labels)

        out = self.model(
            input_ids=_to_device(batch.input_ids),
            position_ids=_to_device(batch.position_ids),
            labels=row,
            shift_labels=row,
            num_items_in_batch=num_trained,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )

        loss: Tensor = out.loss
        return loss


def _to_device(values: np.ndarray) -> Tensor:
    """Return [tokens] as [1, tokens] on the device."""
    return torch.from_numpy(np.array(values))[None].to(device.torch_device())


def hugging_face_config(shape: ModelShape) -> Any:
    """Return transformers' configuration of a shape."""
    from transformers import AutoConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if shape.rope_scaling_factor is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": shape.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    experts: dict[str, Any] = {}
    if shape.num_experts is not None:
        experts = {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.moe_router_topk,
            "moe_intermediate_size": shape.moe_ffn_hidden_size,
            "norm_topk_prob": True,
        }
    return AutoConfig.for_model(
        shape.model_type,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=shape.tied_embeddings,
        rope_parameters=rope,
        **experts,
    )


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention [1, tokens, heads, head size]. transformers calls it with these names.

    Args:
        query, key, value: [1, heads, tokens, head size]
        options: its own (`scaling`), and what the model is called with.
    """
    cu_seqlens, longest = options["cu_seq_lens_q"], options["max_length_q"]
    scale = options.get("scaling")
    packed = [part[0].transpose(0, 1).contiguous() for part in (query, key, value)]
    if not query.is_cuda:
        return _attend_by_segment(packed, cu_seqlens, scale)[None], None

    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = (
        {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    )
    if "enable_gqa" in names:
        causal["enable_gqa"] = True
    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    return varlen_attn(*packed, *bounds, scale=scale, **causal)[None], None


def _attend_by_segment(packed: list[Tensor], cu_seqlens: Tensor, scale: float | None) -> Tensor:
    """Return attention [tokens, heads, head size] on a CPU."""
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for segment in zip(*(part.split(lengths) for part in packed), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in segment)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
