"""A small tokenizer of Qwen3's kind: text -> a folder that `AutoTokenizer.from_pretrained` loads offline.

    text --NFC--> text --split--> words and runs --bytes--> byte-level BPE --> ids
    "Let's go" -> "Let", "'s", " go"     "num_rows" -> "num", "_rows"     "2024" -> "2", "0", "2", "4"

Ids: the BPE's vocabulary first, then `ADDED_TOKENS` in order, as in Qwen3's own tokenizer. Every byte is in
the vocabulary, so any text can be encoded, and decoding gives it back in Unicode's normal form C.
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
"""Text -> whether decoding with `skip_special_tokens` leaves it out, as Qwen3 has it."""

MAX_LENGTH_TOKENS = 2048

SPLIT = (
    r"[ _'’]?\p{L}[\p{L}\p{M}]*"  # a word with its accents, and one sign in front: " word", "_name", "'s"
    r"|\p{N}"  # digits one by one, so that numbers are spelt the same wherever they stand
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # a run of punctuation, with the line break after it
    r"|\s*[\r\n]+"  # line breaks, with the blanks before them
    r"|\s+(?!\S)"  # blanks, but for the one that belongs to the next word
    r"|\s+"
)
"""Where BPE may not merge across: the bounds of these pieces."""

_ROLES = ("system", "user", "assistant")
_ROLE_WEIGHT = 1000


def build_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = 2048) -> None:
    """Trains a tokenizer and writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The same texts give the same files, byte for byte.

    Args:
        texts: what to train on.
        folder: made where it is missing.
        vocab_size: tokens in all, the added ones included; fewer where the texts are too short for so many.

    Raises:
        ConfigError: `vocab_size` is too small to hold all bytes and the added tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(ADDED_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small: {len(alphabet)} bytes and {len(ADDED_TOKENS)} added tokens "
            f"need {smallest}"
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
    # The template writes a role into every turn but the texts need not hold the word: it shall be one token.
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
    # Written here and not by save_pretrained, whose files differ between releases of transformers.
    _write_json(
        folder / "tokenizer_config.json",
        {
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS_TOKEN,
            "model_max_length": MAX_LENGTH_TOKENS,
            "pad_token": PAD_TOKEN,
            # The name that takes tokenizer.json as it is, in transformers 4 and 5. Under "Qwen2Tokenizer",
            # transformers 5 would put Qwen's own split pattern in place of ours.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (folder / "chat_template.jinja").write_bytes(CHAT_TEMPLATE.read_bytes())


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
