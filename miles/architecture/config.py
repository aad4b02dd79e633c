"""A model's shape: read from a Hugging Face `config.json`, or from the `args` of a Megatron checkpoint.

Training and converting both build on this record, so that the two can never disagree about what a
configuration means. It holds no weights and imports neither torch nor Megatron.

config.json   ->   model_type "qwen3"   ->   miles/convert/families/qwen3.py   ->   ModelShape
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from miles.common import storage
from miles.errors import CheckpointError

_FAMILIES = "miles.architecture.families"


class Family(Protocol):
    """What a family's module declares, beside its parameter map."""

    ARCHITECTURE: str
    """of `architectures` in config.json"""

    def shape(self, config: HfConfig) -> ModelShape: ...


def families() -> list[str]:
    """The `model_type`s that are understood: each has a file."""
    package = importlib.import_module(_FAMILIES)
    return sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_"
    )


def family_module(model_type: str) -> Any:
    """The module of a family."""
    return importlib.import_module(f"{_FAMILIES}.{model_type}")


@dataclass(frozen=True)
class HfConfig:
    """The content of a `config.json`, and what a family's file asks of it."""

    values: Mapping[str, Any]
    where: str
    """names the file in errors"""

    def __getitem__(self, name: str) -> Any:
        """
        Raises:
            CheckpointError: a setting that must be there is not.
        """
        if self.values.get(name) is None:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    @property
    def rope(self) -> HfConfig:
        """What is said of the rotary embedding; an older file says it by another name."""
        return HfConfig(
            self.get("rope_parameters") or self.get("rope_scaling") or {},
            f"{self.where}: rope_parameters",
        )

    @property
    def rope_type(self) -> str:
        rope = self.rope
        return str(rope.get("rope_type") or rope.get("type", "default"))

    def require(self, *settings: tuple[str, Any, Any]) -> None:
        """Refuses what no part of the model is built for.

        Args:
            settings: name, value, and the only value that is understood.

        Raises:
            CheckpointError: all that differ.
        """
        unsupported = [
            f"{name} = {value!r}, only {wanted!r} is supported"
            for name, value, wanted in settings
            if value != wanted
        ]
        if unsupported:
            raise CheckpointError(f"{self.where}: " + "; ".join(unsupported))


@dataclass(frozen=True)
class ModelShape:
    """The numbers that fix a decoder's parameters. Field names are Megatron's where it has one."""

    model_type: str
    """Hugging Face `model_type`, one of `families()`"""
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
    """of one expert"""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str) -> ModelShape:
        """Reads the content of a `config.json`.

        Args:
            config: the parsed JSON.
            where: names the file in errors.

        Raises:
            CheckpointError: an architecture or a setting that is not understood.
        """
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{where}: a JSON object was expected")
        model_type = config.get("model_type")
        if model_type not in families():
            raise CheckpointError(
                f"{where}: model_type {model_type!r} is not one of {', '.join(families())}, the families known so far"
            )
        family: Family = family_module(model_type)
        architectures = config.get("architectures") or [family.ARCHITECTURE]
        found = HfConfig(config, where)
        found.require(
            ("architectures", architectures, [family.ARCHITECTURE]),
            ("quantization_config", config.get("quantization_config"), None),
        )
        try:
            return family.shape(found)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(
                f"{where}: a setting is not what it should be ({error})"
            ) from error

    @classmethod
    def from_hf_folder(cls, url: str) -> ModelShape:
        """Reads `config.json` of a Hugging Face checkpoint's folder (fsspec URL).

        Raises:
            CheckpointError: it is missing, is not JSON, or is of an unknown architecture.
        """
        where = storage.join(url, "config.json")
        try:
            config = json.loads(storage.read_text(where))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{where}: no such file; expected a Hugging Face checkpoint's folder"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{where}: not JSON ({error})") from error
        return cls.from_hf_config(config, where)

    def megatron_args(self) -> dict[str, Any]:
        """What Megatron-LM's loader reads of the model from a checkpoint's `args` (`--use-checkpoint-args`)."""
        return {
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
            "rope_scaling_factor": self.rope_scaling_factor
            or 8.0,  # Megatron-LM's default, unused without scaling
            "num_experts": self.num_experts,
            **({} if self.num_experts is None else self._moe_args()),
        }

    def _moe_args(self) -> dict[str, Any]:
        return {
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
    ) -> argparse.Namespace:
        """`args` of a checkpoint's common part, as Megatron-LM's loader wants them.

        Args:
            padded_vocab_size: rows of the stored embedding; None: none are added.
            tensor, pipeline, expert, expert_tensor: sizes of the layout that it is saved from.
            consumed_rows: rows of the data that were trained on.
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
        )

    def differences(self, args: Mapping[str, Any]) -> list[str]:
        """In which sizes a Megatron checkpoint's `args` (as a mapping) differ from this shape, one sentence each.

        A name that the checkpoint does not state does not count, nor do rows of padding behind the vocabulary.
        """
        wanted = self.megatron_args()
        differing = [
            f"{name} is {args[name]} in the checkpoint, {wanted[name]} in the configuration"
            for name in wanted
            if name not in _NOT_A_SIZE and name in args and args[name] != wanted[name]
        ]
        rows = args.get("padded_vocab_size")
        if rows is not None and rows < self.vocab_size:
            differing.append(
                f"padded_vocab_size is {rows} in the checkpoint, vocab_size {self.vocab_size} in the configuration"
            )
        return differing

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


_NOT_A_SIZE = (
    *(
        "vocab_size",
        "padded_vocab_size",
    ),  # Megatron-LM's own count is that of the tokenizer, then padded
    *("seq_length", "max_position_embeddings", "attention_dropout", "hidden_dropout"),
    "use_rotary_position_embeddings",  # an older name of `position_embedding_type`
)
