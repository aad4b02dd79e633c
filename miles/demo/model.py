"""A tiny Qwen3 with seeded random weights: a tokenizer's folder -> a Hugging Face checkpoint.

The vocabulary is that of the tokenizer. So the same function makes the demo's model (2,048 entries,
about 1 M parameters) and, from Qwen3's own tokenizer, a tiny model with the full vocabulary, for
real input.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from miles.common import storage
from miles.common.file_errors import in_own_words
from miles.data.tokens.library import remedy
from miles.errors import ConfigError, TemplateError

INIT_STD = 0.02
"""Standard deviation of the weights. A fresh model's loss is then ln(vocabulary) to 1 %."""

VOCAB_MULTIPLE = 64

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class TinySizes:
    """The sizes of a tiny Qwen3."""

    hidden_size: int = 128
    ffn_hidden_size: int = 384
    num_layers: int = 4
    num_attention_heads: int = 4
    num_query_groups: int = 2
    """key/value heads"""
    kv_channels: int = 32
    """size of one head"""
    vocab_size: int | None = None
    """Rows of the embedding; None: the tokenizer's length rounded up to a multiple of 64, so that,
    as in Qwen3's own checkpoints, some rows belong to no token."""


def build_model(
    tokenizer_folder: Path, folder: Path, *, seed: int = 0, sizes: TinySizes | None = None
) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files.

    Args:
        tokenizer_folder: a tokenizer that `AutoTokenizer.from_pretrained` loads.
        folder: created if need be; may be `tokenizer_folder`.
        seed: the same seed gives the same weights, float32. The caller's random state is kept.

    Raises:
        TemplateError: no tokenizer can be loaded from `tokenizer_folder`.
        ConfigError: the vocabulary is smaller than the tokenizer.
    """
    sizes = sizes or TinySizes()
    tokenizer = _load_tokenizer(tokenizer_folder)
    vocab_size = sizes.vocab_size
    if vocab_size is None:
        vocab_size = -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab_size < len(tokenizer):
        raise ConfigError(
            f"vocab_size {vocab_size} is smaller than the {len(tokenizer)} tokens of "
            f"{tokenizer_folder}"
        )

    with torch.random.fork_rng(devices=[]):  # the constructor draws weights too
        model = Qwen3ForCausalLM(_qwen3_config(sizes, vocab_size, tokenizer))
    _initialize(model, seed, sizes.num_layers)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )

    folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()  # one file, written at once
    model.save_pretrained(folder, safe_serialization=True)
    transformers_logging.enable_progress_bar()

    if folder.resolve() != tokenizer_folder.resolve():
        for name in _TOKENIZER_FILES:
            if (tokenizer_folder / name).exists():
                shutil.copyfile(tokenizer_folder / name, folder / name)


def build_tiny_qwen3(tokenizer: str, save: str) -> None:
    """Build a tiny Qwen3 over any tokenizer's vocabulary (`miles tiny-model`).

    Args:
        tokenizer: folder of a Hugging Face tokenizer (fsspec URL).
        save: folder to write the checkpoint to (fsspec URL).

    Raises:
        SourceError: `tokenizer` is not a folder.
        TemplateError: it holds no tokenizer.
    """
    with storage.local_folder(tokenizer, "tokenizer folder") as tokenizer_folder:
        if storage.is_local(save):
            build_model(tokenizer_folder, Path(storage.filesystem(save)[1]))
            return
        with tempfile.TemporaryDirectory(prefix="miles-") as staged:
            build_model(tokenizer_folder, Path(staged))
            storage.upload_folder(Path(staged), save, last="config.json")


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True
        )
    except Exception as error:  # a broken tokenizer.json raises a bare Exception (tokenizers 0.23)
        raise TemplateError(
            f"{folder}: no tokenizer can be loaded from this folder; expected tokenizer.json and "
            f"tokenizer_config.json ({in_own_words(error)}). {remedy(str(folder))}"
        ) from error
    return tokenizer


def _qwen3_config(
    sizes: TinySizes, vocab_size: int, tokenizer: PreTrainedTokenizerBase
) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_query_groups,
        head_dim=sizes.kv_channels,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=INIT_STD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _initialize(model: torch.nn.Module, seed: int, num_layers: int) -> None:
    """Set norms to one and draw the other weights from a normal distribution.

    They are drawn in the order of their names, so that no release of transformers reorders the
    draws. Weights that write into the residual stream are scaled down by sqrt(2 x layers), as in
    GPT-2 (Radford et al. 2019, section 2.3).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = INIT_STD / (2 * num_layers) ** 0.5 if is_residual else INIT_STD
                weight.normal_(0.0, std, generator=generator)
