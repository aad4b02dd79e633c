"""Models of the GPU benchmarks: published shapes as numbers, so that nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from miles.architecture.config import ModelShape
from miles.train.estimate.memory import Training, estimate
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rotary_base": 1e6,
    "norm_epsilon": 1e-6,
    "tied_embeddings": True,
    "qk_layernorm": True,
    "add_qkv_bias": False,
}

_TINY: dict[str, Any] = _QWEN3 | {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}

_TINY_EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "tied_embeddings": False,
}

SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(**_TINY),
    "tiny-moe": ModelShape(**_TINY | _TINY_EXPERTS),
    "qwen3-0.6b": ModelShape(
        **_QWEN3, num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16
    ),
    "qwen3-1.7b": ModelShape(
        **_QWEN3, num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16
    ),
    "qwen3-4b": ModelShape(
        **_QWEN3, num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32
    ),
    "llama-3.2-1b": ModelShape(
        model_type="llama",
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rotary_base=5e5,
        norm_epsilon=1e-5,
        tied_embeddings=True,
        qk_layernorm=False,
        add_qkv_bias=False,
        rope_scaling_factor=32.0,
    ),
    "qwen3-30b-a3b": ModelShape(
        **_QWEN3
        | {"model_type": "qwen3_moe", "num_query_groups": 4, "tied_embeddings": False}
        | {"num_experts": 128, "moe_router_topk": 8, "moe_ffn_hidden_size": 768},
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
    ),
}
"""name -> shape, from the `config.json` of each model."""

SPARE = 0.08
"""Share of a card that a case leaves free of what is estimated."""

RECOMPUTE_LAYERS = RecomputeConfig(granularity="full", method="uniform", num_layers=1)


@dataclass(frozen=True)
class Case:
    """A model with the size of its micro-batches."""

    model: str
    num_tokens: int
    """of a full micro-batch"""
    num_layers: int | None = None
    """None: all of the model's"""
    recompute: RecomputeConfig = KEEP_ALL
    is_full: bool = False
    """each micro-batch is one sample, as long as it; else samples of real lengths"""

    @property
    def shape(self) -> ModelShape:
        shape = SHAPES[self.model]
        return shape if self.num_layers is None else replace(shape, num_layers=self.num_layers)

    @property
    def name(self) -> str:
        """Return what the case is called in tables."""
        layers = "" if self.num_layers is None else f", {self.num_layers} layers"
        again = "" if self.recompute.granularity is None else ", recomputed"
        samples = " of one sample" if self.is_full else ""
        return f"{self.model}{layers}, {self.num_tokens:,} tokens{samples}{again}"

    def estimated_bytes(self, precision: Precision) -> int:
        """Return the memory that `miles train --dry-run` estimates for the case on one GPU."""
        (stage,) = estimate(
            self.shape,
            Layout(1),
            Training(precision=precision, recompute=self.recompute),
            max_tokens_per_gpu=self.num_tokens,
        )
        return stage.total

    def fits(self, card_bytes: int) -> bool:
        """Return whether the case is estimated to fit on a card, with some memory to spare."""
        return self.estimated_bytes(Precision.BF16) < (1 - SPARE) * card_bytes


MAIN_CASES = (
    Case("qwen3-4b", 16_384),
    Case("qwen3-4b", 9_216),
    Case("qwen3-1.7b", 16_384),
    Case("qwen3-1.7b", 9_216),
    Case("qwen3-0.6b", 9_216),
    Case("qwen3-0.6b", 2_048),
)
"""From the largest to the smallest; the first that fits is measured in full."""

FURTHER_CASES = (
    # What a figure was published for, on 8 GPUs: long samples, every layer computed again.
    Case("qwen3-4b", 16_384, recompute=RECOMPUTE_LAYERS, is_full=True),
    Case("qwen3-1.7b", 16_384, recompute=RECOMPUTE_LAYERS, is_full=True),
    Case("qwen3-1.7b", 32_768),
    Case("qwen3-1.7b", 9_216),
    Case("llama-3.2-1b", 16_384),
    Case("qwen3-30b-a3b", 9_216, num_layers=4),
)
"""Timed as far as they fit and the budget allows."""

TINY_CASE = Case("tiny", 256)
TINY_FURTHER = (
    Case("tiny-moe", 128),
    Case("tiny", 128, recompute=RECOMPUTE_LAYERS, is_full=True),
)


def main_case(card_bytes: int | None) -> Case:
    """Return the case that is measured in full; without a card, the tiny one."""
    if card_bytes is None:
        return TINY_CASE
    return next((case for case in MAIN_CASES if case.fits(card_bytes)), TINY_CASE)


def further_cases(card_bytes: int | None, main: Case) -> list[Case]:
    """Return the other cases that fit on a card."""
    if card_bytes is None:
        return list(TINY_FURTHER)
    return [case for case in FURTHER_CASES if case != main and case.fits(card_bytes)]
