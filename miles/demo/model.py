"""A tiny Qwen3 with seeded random weights: a tokenizer's folder -> a Hugging Face checkpoint.

The vocabulary is the tokenizer's, so that the same function makes the demo's model (2,048 entries, about
1 M parameters) and, from Qwen3's own tokenizer, a tiny model of the full vocabulary for real input.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from miles.common import storage
from miles.errors import ConfigError, TemplateError

INIT_STD = 0.02
"""Standard deviation of the weights; small enough that a fresh model's loss is ln(vocabulary) to 1 %."""

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


def build_model(
    tokenizer_folder: Path,
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    hidden_size: int = 128,
    ffn_hidden_size: int = 384,
    num_layers: int = 4,
    num_attention_heads: int = 4,
    num_query_groups: int = 2,
    kv_channels: int = 32,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors (float32), and the tokenizer's files.

    Args:
        tokenizer_folder: a tokenizer that `AutoTokenizer.from_pretrained` loads.
        folder: made where it is missing; may be `tokenizer_folder`.
        seed: the same seed gives the same weights. The caller's random state is left as it was.
        vocab_size: rows of the embedding; None: the tokenizer's length rounded up to a multiple of 64. Like
            Qwen3's own checkpoints the embedding then has rows that no token uses.
        hidden_size, ffn_hidden_size, num_layers: the decoder's size.
        num_attention_heads, num_query_groups: heads of queries, and of keys and values.
        kv_channels: size of one head.

    Raises:
        TemplateError: no tokenizer can be loaded from `tokenizer_folder`.
        ConfigError: `vocab_size` is smaller than the tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception (tokenizers 0.23)
        raise TemplateError(
            f"{tokenizer_folder}: no tokenizer can be loaded from this folder; expected tokenizer.json and "
            f"tokenizer_config.json ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    num_tokens = len(tokenizer)
    if vocab_size is None:
        vocab_size = -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab_size < num_tokens:
        raise ConfigError(
            f"vocab_size {vocab_size} is smaller than the {num_tokens} tokens of {tokenizer_folder}"
        )
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=ffn_hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_query_groups,
        head_dim=kv_channels,
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
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights too
        model = Qwen3ForCausalLM(config)
    _initialize(model, seed, num_layers)
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
    """`miles demo-model --tokenizer DIR --save DIR`: a tiny Qwen3 over any tokenizer's vocabulary.

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


def _initialize(model: torch.nn.Module, seed: int, num_layers: int) -> None:
    """Norms at one; other weights normal, in the order of their names, so that no release reorders the draws.

    What writes into the residual stream is scaled down by sqrt(2 x layers), as in GPT-2
    (Radford et al. 2019, section 2.3).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = INIT_STD / (2 * num_layers) ** 0.5 if residual else INIT_STD
                weight.normal_(0.0, std, generator=generator)
