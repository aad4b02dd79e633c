"""Train a small tokenizer of Qwen3's kind, in a folder that `AutoTokenizer.from_pretrained` loads.

    text --NFC--> text --split--> words and runs --bytes--> byte-level BPE --> ids

    "Let's go" -> "Let", "'s", " go"
    "num_rows" -> "num", "_rows"
    "2024" -> "2", "0", "2", "4"

Ids: the BPE's vocabulary first, then `ADDED_TOKENS` in order, as in Qwen3's own tokenizer. Every
byte is in the vocabulary, so any text can be encoded, and decoding gives it back in Unicode's
normal form C.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from miles.errors import ConfigError

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"

EOS_TOKEN = "<|im_end|>"  # noqa: S105  (a token of the vocabulary)
PAD_TOKEN = "<|endoftext|>"  # noqa: S105

ADDED_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
"""Text -> whether it is special: left out by `skip_special_tokens`. As in Qwen3."""

MAX_LENGTH_TOKENS = 2048

SPLIT = (
    # a word with its accents, and one sign in front: " word", "_name", "'s"
    r"[ _'’]?\p{L}[\p{L}\p{M}]*"
    r"|\p{N}"  # digits one by one, so that a number is spelt the same everywhere
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # a run of punctuation, with the line break after it
    r"|\s*[\r\n]+"  # line breaks, with the blanks before them
    r"|\s+(?!\S)"  # blanks, but for the one that belongs to the next word
    r"|\s+"
)
"""The pieces of a text. BPE merges within a piece only."""

_ROLES = ("system", "user", "assistant")
_ROLE_WEIGHT = 1000


def build_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = 2048) -> None:
    """Train a tokenizer; write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The same texts give the same files, byte for byte.

    Args:
        texts: the training text.
        folder: created if need be.
        vocab_size: tokens in all, with the added ones. Short texts may give fewer.

    Raises:
        ConfigError: `vocab_size` is too small to hold all bytes and the added tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(ADDED_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small: {len(alphabet)} bytes and "
            f"{len(ADDED_TOKENS)} added tokens need {smallest}"
        )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    # The template writes a role into every turn. The texts may not have the word, and yet it shall
    # be one token.
    tokenizer.train_from_iterator(chain(texts, _ROLES * _ROLE_WEIGHT), trainer)

    tokenizer.add_tokens(
        [
            AddedToken(
                text,
                special=special,
                normalized=False,
                single_word=False,
                lstrip=False,
                rstrip=False,
            )
            for text, special in ADDED_TOKENS.items()
        ]
    )

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Not by save_pretrained, whose files differ between releases of transformers.
    _write_json(
        folder / "tokenizer_config.json",
        {
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS_TOKEN,
            "model_max_length": MAX_LENGTH_TOKENS,
            "pad_token": PAD_TOKEN,
            # The class that takes tokenizer.json as it is, in transformers 4 and 5. With
            # "Qwen2Tokenizer", transformers 5 would put Qwen's own split pattern in place of ours.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (folder / "chat_template.jinja").write_bytes(CHAT_TEMPLATE.read_bytes())


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
