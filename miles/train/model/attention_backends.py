"""The ways to compute attention over packed sequences, and the choice of one.

    query [tokens, heads, head size]   key, value [tokens, groups, head size]
        ->  [tokens, heads, head size]

Each segment is causal within itself and sees nothing of its neighbours. Segment by segment, with
`scaled_dot_product_attention`, is the definition, and what a CPU computes; so does a GPU in
float32, which the kernels for packed sequences do not take.

    --attention-backend    on a GPU, in bfloat16 and float16
    auto                   torch's variable-length kernel, a FlashAttention 2; from Hopper on, cuDNN
                           for long segments (`long_segments`)
    flash                  the best installed package of FlashAttention 4, 3 and 2, else torch's
    fused                  Transformer Engine's
    local, unfused         segment by segment
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.errors import ConfigError
from miles.train.model import device
from miles.train.model.long_segments import attention_of_one, is_long, is_usable

Attention = Callable[[Tensor, Tensor, Tensor, "Segments", float], Tensor]
"""query, key, value, where the segments are, the scale of the scores -> [tokens, heads, size]"""

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""The precisions of the kernels for packed sequences."""

_FLASH_ATTN_MODULES = {
    "FlashAttention 2": "flash_attn.flash_attn_interface",
    "FlashAttention 3": "flash_attn_interface",
    "FlashAttention 4": "flash_attn.cute",
}
_BEST_FLASH_ATTN = {
    8: ("FlashAttention 2",),
    9: ("FlashAttention 3", "FlashAttention 4", "FlashAttention 2"),
}
"""The packages that run on a GPU of each major compute capability, the fastest first: 3 is written
for Hopper alone, 4 for Blackwell and Hopper."""
_NEWEST_FIRST = ("FlashAttention 4", "FlashAttention 2")


@dataclass(frozen=True)
class Segments:
    """The segments of a micro-batch: their places and lengths."""

    cu_seqlens: Tensor
    """int32 [segments + 1], on the device"""
    lengths: tuple[int, ...]
    """tokens of each, on the host"""
    short_cu_seqlens: Tensor
    """int32 [short segments + 1]: `cu_seqlens` of those that are not long, laid end to end"""

    @property
    def longest(self) -> int:
        """Return the tokens of the longest segment, and 2 where it has 1.

        Torch's kernel swaps heads and tokens where no segment has more than one token, and what it
        keeps of the softmax is then in another order than its backward pass reads it.
        """
        return max(2, *self.lengths)


@functools.cache
def attention(backend: str) -> Attention:
    """Return the attention of `--attention-backend` for this process's device.

    Raises:
        ConfigError: what it needs is not installed.
    """
    if backend in ("local", "unfused") or not device.has_gpu():
        return by_segment
    if backend == "flash":
        return _flash_attn(torch.cuda.get_device_capability()[0])
    if backend == "fused":
        return _transformer_engine()
    return _by_torch


def by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Return attention, one segment at a time."""
    lengths = list(segments.lengths)
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)

    outputs = []
    for q, k, v in parts:
        # torch wants [batch, heads, tokens, head size]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(out[0].transpose(0, 1))

    return _end_to_end(outputs)


def _end_to_end(outputs: Sequence[Tensor]) -> Tensor:
    """Return the outputs of segments in one tensor.

    One alone is returned as it is: a copy would be kept for the backward pass, in each layer.
    """
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# --- torch's kernels


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Return attention from what torch ships: cuDNN for long segments, FlashAttention 2 for others.

    Either takes fewer key and value heads than query heads.
    """
    lengths = list(segments.lengths)
    if not any(is_long(length) for length in lengths) or not is_usable(query, key):
        return _torch_varlen(query, key, value, segments, scale)

    parts = list(zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True))
    outputs_of_short: Iterator[Tensor] = iter(())
    short = [part for part in parts if not is_long(len(part[0]))]
    if short:
        queries, keys, values = (torch.cat(heads) for heads in zip(*short, strict=True))
        short_lengths = tuple(len(part[0]) for part in short)
        cu_seqlens = segments.short_cu_seqlens
        short_segments = Segments(cu_seqlens, short_lengths, cu_seqlens)
        out = _torch_varlen(queries, keys, values, short_segments, scale)
        outputs_of_short = iter(out.split(short_lengths))

    outputs = []
    for part in parts:
        if is_long(len(part[0])):
            outputs.append(attention_of_one(*part, scale))
        else:
            outputs.append(next(outputs_of_short))
    return _end_to_end(outputs)


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Return attention from the variable-length kernel that torch ships.

    This is the operator below `torch.nn.attention.varlen.varlen_attn`. The function around it asks
    for equal numbers of heads or for an option that is not in each release, makes a random state
    that nothing reads, and is Python again in the backward pass: 4 % of attention's time on an H100
    with torch 2.11. The operator's first ten arguments are the same in 2.10 to 2.13. It takes fewer
    key and value heads than query heads.
    """
    dropout, is_causal, returns_mask = 0.0, True, False
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        segments.cu_seqlens,
        segments.cu_seqlens,
        segments.longest,
        segments.longest,
        dropout,
        is_causal,
        returns_mask,
        scale=scale,
    )[0]
    return out


# --- packages


def _flash_attn(capability: int) -> Attention:
    """Return the best installed flash-attn for a GPU, else torch's kernel, with a warning.

    Launch lines for reinforcement learning ask for flash as a matter of course, and torch's own
    kernel is FlashAttention 2. So a missing package is no error.

    Args:
        capability: the GPU's major compute capability.
    """
    for name in _BEST_FLASH_ATTN.get(capability, _NEWEST_FIRST):
        if _is_installed(_FLASH_ATTN_MODULES[name]):
            module = importlib.import_module(_FLASH_ATTN_MODULES[name])
            return functools.partial(_by_flash_attn, module.flash_attn_varlen_func)

    warnings.warn(
        "--attention-backend flash: no flash-attn package for this GPU is installed; torch's own "
        "kernel, which is FlashAttention 2, is used. For a faster one install flash-attn-3 "
        "(Hopper) or flash-attn-4 (Hopper, Blackwell)",
        stacklevel=2,
    )
    return _by_torch


def _by_flash_attn(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
) -> Tensor:
    """Return attention from a package's `flash_attn_varlen_func`; 2, 3 and 4 share these names."""
    out = function(
        query,
        key,
        value,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.longest,
        max_seqlen_k=segments.longest,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # FlashAttention 4, and early releases of 3, return the sums of the softmax beside it.
    return out[0] if isinstance(out, tuple) else out


def _transformer_engine() -> Attention:
    """Return Transformer Engine's attention.

    Raises:
        ConfigError: it is not installed.
    """
    if not _is_installed("transformer_engine.pytorch"):
        raise ConfigError(
            "--attention-backend fused is Transformer Engine's attention, which is not installed "
            "here; install transformer-engine[pytorch], or give auto: torch's own kernel"
        )
    return _by_transformer_engine


def _by_transformer_engine(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Return attention from Transformer Engine's `DotProductAttention`."""
    module = _dot_product_attention(query.shape[1], key.shape[1], query.shape[2], scale)
    out: Tensor = module(
        query,
        key,
        value,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_kv=segments.cu_seqlens,
        max_seqlen_q=segments.longest,
        max_seqlen_kv=segments.longest,
    )
    return out.view_as(query)


@functools.cache
def _dot_product_attention(num_heads: int, num_groups: int, head_size: int, scale: float) -> Any:
    """Return Transformer Engine's module, the same for all layers.

    It is no part of the model, whose checkpoints would otherwise have its state for FP8.
    """
    package = importlib.import_module("transformer_engine.pytorch")
    return package.DotProductAttention(
        num_heads,
        head_size,
        num_gqa_groups=num_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package around it
        return False
