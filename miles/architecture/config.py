"""The shape of a model as a record, between its `config.json` and a Megatron checkpoint's `args`.

`HfConfig` is the content of a `config.json`, as a family's file reads it; `ModelShape` is what that
file makes of it (`families.read_shape`). No weights, no torch, no Megatron.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from miles.common.shown import shown
from miles.errors import CheckpointError


@dataclass(frozen=True)
class HfConfig:
    """The content of a `config.json`, for a family's file to read settings from."""

    values: Mapping[str, Any]
    where: str
    """names the file in errors"""

    def __getitem__(self, name: str) -> Any:
        """Return a setting that must be there.

        Raises:
            CheckpointError: it is not there.
        """
        if self.values.get(name) is None:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, or the default where it is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a setting that is a whole number.

        Args:
            default: where it is missing or null; None: it must be there.

        Raises:
            CheckpointError: names the setting, what was found and what was expected.
        """
        value = self[name] if default is None else self.get(name, default)
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_whole:
            raise self._refused(name, value, "a whole number")
        return int(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a setting that is a finite number above 0: as `whole`."""
        value = self[name] if default is None else self.get(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            number = float(value) if is_number else math.nan
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise self._refused(name, value, "a finite number above 0")
        return number

    def flag(self, name: str, default: bool) -> bool:
        """Return a setting that is true or false: as `whole`."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._refused(name, value, "true or false")
        return value

    @property
    def rope(self) -> HfConfig:
        """The settings of the rotary embedding, which older files keep under another name.

        Raises:
            CheckpointError: they are not one JSON object, or there are two that differ.
        """
        given = {name: self.get(name) for name in ("rope_parameters", "rope_scaling")}
        for name, value in given.items():
            if value is not None and not isinstance(value, Mapping):
                raise self._refused(name, value, "a JSON object or null")
            if any(isinstance(inner, Mapping) for inner in (value or {}).values()):
                raise self._refused(name, value, "one object for all layers, not one for each kind")

        new, old = given.values()
        if new and old and not _same_rope(new, old):
            raise CheckpointError(
                f"{self.where}: rope_scaling = {shown(old)} differs from rope_parameters = "
                f"{shown(new)}, and libraries do not agree which counts (transformers takes "
                "rope_scaling): leave out the one that is not the model's"
            )
        name = "rope_parameters" if new else "rope_scaling"
        return HfConfig(new or old or {}, f"{self.where}: {name if old else 'rope_parameters'}")

    @property
    def rope_type(self) -> str:
        """The scaling of rotary frequencies; "default": none."""
        return str(self.rope.get("rope_type") or self.rope.get("type", "default"))

    def require(self, *settings: tuple[str, Any, Any]) -> None:
        """Refuse values that the model is not built for.

        Args:
            settings: name, value, and the only value that is understood.

        Raises:
            CheckpointError: names all that differ.
        """
        unsupported = [
            f"{name} = {shown(value)}, only {wanted!r} is supported"
            for name, value, wanted in settings
            if value != wanted
        ]
        if unsupported:
            raise CheckpointError(f"{self.where}: " + "; ".join(unsupported))

    def _refused(self, name: str, value: object, expected: str) -> CheckpointError:
        """Return the error for a value that a setting cannot have."""
        return CheckpointError(
            f"{self.where}: {name} = {shown(value)}; {expected} was expected. Correct it, or copy "
            "the file again from the model's source"
        )


def _same_rope(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two settings of the rotary embedding say the same, but for its base."""
    plain = [
        {name: value for name, value in settings.items() if name not in ("rope_theta", "type")}
        | {"rope_type": settings.get("rope_type") or settings.get("type") or "default"}
        for settings in (one, other)
    ]
    bases = {settings["rope_theta"] for settings in (one, other) if "rope_theta" in settings}
    return plain[0] == plain[1] and len(bases) < 2


@dataclass(frozen=True)
class ModelShape:
    """The numbers that fix a decoder's parameters. Field names are Megatron's where it has one."""

    model_type: str
    """Hugging Face `model_type`, one of `families.model_types()`"""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """key/value heads"""
    kv_channels: int
    """size of one head"""
    vocab_size: int
    """rows of the embedding"""
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    tied_embeddings: bool
    qk_layernorm: bool
    add_qkv_bias: bool
    rope_scaling_factor: float | None = None
    """Llama 3.1's scaling of the rotary frequencies; None: none"""
    num_experts: int | None = None
    """experts of each layer; None: a dense model"""
    moe_router_topk: int = 0
    """experts that a token goes through"""
    moe_ffn_hidden_size: int = 0
    """width of one expert's MLP"""

    def megatron_args(self) -> dict[str, Any]:
        """Return what Megatron-LM reads of a model from a checkpoint (`--use-checkpoint-args`)."""
        dense = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "padded_vocab_size": self.vocab_size,
            "vocab_size": self.vocab_size,
            "seq_length": self.max_position_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "position_embedding_type": "rope",
            "use_rotary_position_embeddings": True,
            "rotary_base": int(self.rotary_base),
            "rotary_percent": 1.0,
            "rotary_interleaved": False,
            "norm_epsilon": self.norm_epsilon,
            "normalization": "RMSNorm",
            "qk_layernorm": self.qk_layernorm,
            "add_bias_linear": False,
            "add_qkv_bias": self.add_qkv_bias,
            "swiglu": True,
            "untie_embeddings_and_output_weights": not self.tied_embeddings,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "use_rope_scaling": self.rope_scaling_factor is not None,
            # 8.0 is Megatron-LM's default, unused without scaling.
            "rope_scaling_factor": self.rope_scaling_factor or 8.0,
            "num_experts": self.num_experts,
        }
        if self.num_experts is None:
            return dense

        return dense | {
            "moe_router_topk": self.moe_router_topk,
            "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": False,
        }

    def checkpoint_args(
        self,
        *,
        padded_vocab_size: int | None = None,
        tensor: int = 1,
        pipeline: int = 1,
        expert: int = 1,
        expert_tensor: int = 1,
        consumed_rows: int = 0,
        has_optimizer: bool = False,
    ) -> argparse.Namespace:
        """Return the `args` of a checkpoint's common part, as Megatron-LM's loader wants them.

        Args:
            padded_vocab_size: rows of the stored embedding; None: it is not padded.
            tensor, pipeline, expert, expert_tensor: sizes of the layout that it is saved from.
            consumed_rows: rows of the data that were trained on.
            has_optimizer: the checkpoint holds the optimizer's state.
        """
        return argparse.Namespace(
            **self.megatron_args() | {"padded_vocab_size": padded_vocab_size or self.vocab_size},
            miles_model_type=self.model_type,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=1,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            ckpt_format="torch_dist",
            tokenizer_type="HuggingFaceTokenizer",
            consumed_train_samples=consumed_rows,
            skipped_train_samples=0,
            consumed_valid_samples=0,
            # By these two its loader knows what not to ask for.
            no_save_optim=not has_optimizer,
            no_save_rng=True,
        )

    def differences(self, args: Mapping[str, Any]) -> list[str]:
        """Return one sentence for each size in which a Megatron checkpoint differs from this shape.

        A name that the checkpoint does not state does not count, nor do rows of padding behind the
        vocabulary.

        Args:
            args: of the checkpoint, as a mapping.
        """
        expected = self.megatron_args()
        differing = [
            f"{name} is {args[name]} in the checkpoint, {value} in the configuration"
            for name, value in expected.items()
            if name not in _NOT_A_SIZE and name in args and args[name] != value
        ]

        rows = args.get("padded_vocab_size")
        if rows is not None and rows < self.vocab_size:
            differing.append(
                f"padded_vocab_size is {rows} in the checkpoint, vocab_size {self.vocab_size} in "
                "the configuration"
            )
        return differing

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


_NOT_A_SIZE = (
    "vocab_size",  # Megatron-LM's own is the tokenizer's, and
    "padded_vocab_size",  # this one is padded
    "seq_length",
    "max_position_embeddings",
    "attention_dropout",
    "hidden_dropout",
    "use_rotary_position_embeddings",  # an older name of `position_embedding_type`
)
