"""Small byte-level tokenizers, and texts that are hard on them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from miles.data.tokens.text_encoder import TextEncoder, by_offsets

ADDED = ("<|im_start|>", "<|im_end|>", "<think>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog and thinks that there is nothing else to think about",
    "  if x:\n\t\treturn x\n\n\n    aaaaaaaaaaaa abababab abcabc 1234567890 10 100 1000",
    "caf\u00e9 na\u00efve \u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc \ud55c\uad6d \U0001f469\u200d\U0001f469",
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT_OSS = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
TEXTS = (
    "",
    " ",
    "\0",
    "\ufffd\ufdd0\uffff\U0010ffff",
    "<think>",
    "<think><|im_end|><|im_start|>",
    "a<think>b <|im_end|>\n<|im_start|><|im_star",
    "the thing\u6cd5\u56fd caf\u00e9\u0301 \U0001f469\u200d\U0001f469x",
    "cafe\u0301 <|im_end|>\u0338 \u1112\u1161\u11ab\u212a",
    "aaaaaaa abababab abcabc 1234567 'S 's 'LL \u2019s '\u017f '\u212a",
    " " * 300 + "\n" * 80 + "\r\n\r\n\t x",
    "x\u0085y\u2028z\u3000\u200b\u00b2\u00bd",
)
pieces = st.sampled_from(
    [
        *ADDED,
        "<think",
        "think>",
        "aa",
        "ab",
        "the",
        " ",
        "\n",
        "\r\n",
        "'s",
        "1",
        "e\u0301",
        "\u6cd5",
        "\u1112\u1161\u11ab",
    ]
)
texts_ = st.lists(pieces | st.text(max_size=4), max_size=8).map("".join)


def split_by(pattern: str, behavior: str = "isolated", **options: Any) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior, **options), byte_level]
    )


def small(pattern: str | None = QWEN, added: Sequence[str] = ADDED, **special: Any) -> Tokenizer:
    """A byte-level tokenizer; None: cut as GPT-2 cuts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = whole if pattern is None else split_by(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **special,
    )
    tokenizer.train_from_iterator(CORPUS * 6, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    """The tokenizer with something else in its tokenizer.json."""
    fields = json.loads(tokenizer.to_str())
    change(fields)
    return Tokenizer.from_str(json.dumps(fields))


def require_same(
    tokenizer: Tokenizer, encoder: TextEncoder, text: str, points: Sequence[int] | None = None
) -> None:
    points = range(len(text) + 1) if points is None else points
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids, first, straddled = encoder.encode_at(text, points)
    assert ids.tolist() == encoding.ids
    assert (first, straddled) == by_offsets(encoding.offsets, points)
    assert encoder.encode(text).tolist() == encoding.ids
    assert not encoder.is_surely_longer(text, len(encoding.ids))
