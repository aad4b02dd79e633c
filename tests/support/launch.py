"""Launch lines for tests: configurations of two models, a run with made-up fields, words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from miles.common.flags import Flag, flag_of
from miles.train.config import TrainConfig

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}

QWEN3_235B = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def write_model(folder: Path) -> None:
    """Write the config.json of `QWEN3`: what a launch line asks of a model."""
    (folder / "config.json").write_text(json.dumps(QWEN3))


@dataclass(frozen=True)
class Weather:
    """The weather. It has no say in a run."""

    sky: Annotated[str, Flag("--sky", "COLOUR", "what is above", choices=("blue", "grey"))] = "blue"


@dataclass(frozen=True)
class OneMore(TrainConfig):
    """A run with one field more, and one record more."""

    cups: Annotated[int, Flag("--num-cups", "CUPS", "of tea, 100 % green", minimum=1)] = 3
    weather: Weather = Weather()


def words_of(content: dict[str, Any]) -> list[str]:
    """Return flags and their values as the words of a launch line; a switch is True."""
    words = []
    for name, value in content.items():
        words.append(flag_of(name))
        if value is not True:
            items = value if isinstance(value, list) else [value]
            words += [json.dumps(item) if isinstance(item, dict) else str(item) for item in items]
    return words
