"""Small tokenizers of the kinds that chat models have, and of kinds that lose text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = "capital letters one two the end a b c d def f x if return it s test do n t tidy please "


def _byte_level(normalizer: Any = None, *, prefix: bool = False, split: str = "") -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not split)
    tokenizer.pre_tokenizer = by_bytes
    if split:
        pieces = pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(*, has_bytes: bool = True, strips: bool = False) -> Tokenizer:
    """Llama 2's: a blank before the text, ▁ for blanks, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] if has_bytes else []
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=has_bytes)
    )
    before = [normalizers.Strip()] if strips else []
    tokenizer.normalizer = normalizers.Sequence(
        [*before, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    """Mistral's, as newer conversions write it: the same, by a pre-tokenizer."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _wordpiece() -> Tokenizer:
    """BERT's: words, without what is between them."""
    pieces = ["[UNK]", *_WORDS.split(), *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    pieces += [chr(code) for code in range(33, 127)]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KEEPING: Mapping[str, Callable[[], Tokenizer]] = {
    "GPT-2": _byte_level,
    "RoBERTa": lambda: _byte_level(prefix=True),
    "Llama 3": lambda: _byte_level(split=_LLAMA3),
    "Qwen": lambda: _byte_level(normalizers.NFC(), split=_LLAMA3),
    "Llama 2": _sentencepiece,
    "Mistral": _metaspace,
}
"""Kinds whose ids keep the text."""

LOSING: Mapping[str, tuple[Callable[[], Tokenizer], str]] = {
    "WordPiece": (_wordpiece, "blanks and newlines are lost"),
    "Strip": (lambda: _byte_level(normalizers.Strip()), "blanks and newlines are lost"),
    "a SentencePiece that strips": (
        lambda: _sentencepiece(strips=True),
        "blanks and newlines are lost",
    ),
    "fewer blanks": (
        lambda: _byte_level(normalizers.Replace(Regex(" +"), " ")),
        "blanks and newlines are lost",
    ),
    "Lowercase": (lambda: _byte_level(normalizers.Lowercase()), "capital letters are lost"),
    "NFKC": (lambda: _byte_level(normalizers.NFKC()), "characters are lost"),
    "StripAccents": (
        lambda: _byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "characters are lost",
    ),
    "no bytes": (lambda: _sentencepiece(has_bytes=False), "characters are lost"),
}
"""Kinds whose ids lose text, and what they lose."""


def save_for_chat(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a tokenizer with ChatML's tokens and template to a folder, and return the folder."""
    from transformers import PreTrainedTokenizerFast

    tokens = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in tokens]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder
