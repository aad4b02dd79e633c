"""Ids and positions through tiktoken are those of `tokenizers`; what is not proven is refused, and says why."""

import json
import random
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from miles.data import bpe
from miles.data.bpe import TextEncoder, by_offsets, text_encoder
from miles.data.types import RowRejected
from miles.errors import TemplateError

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
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, **options), byte_level])


def small(pattern: str | None = QWEN, added: Sequence[str] = ADDED, **special: Any) -> Tokenizer:
    """A byte-level tokenizer; None: cut as GPT-2 cuts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = whole if pattern is None else split_by(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, **special
    )
    tokenizer.train_from_iterator(CORPUS * 6, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    """The tokenizer with something else in its tokenizer.json."""
    fields = json.loads(tokenizer.to_str())
    change(fields)
    return Tokenizer.from_str(json.dumps(fields))


def require_same(tokenizer: Tokenizer, encoder: TextEncoder, text: str, points: Sequence[int] | None = None) -> None:
    points = range(len(text) + 1) if points is None else points
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids, first, straddled = encoder.encode_at(text, points)
    assert ids.tolist() == encoding.ids
    assert (first, straddled) == by_offsets(encoding.offsets, points)
    assert encoder.encode(text).tolist() == encoding.ids
    assert not encoder.is_surely_longer(text, len(encoding.ids))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small()


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> TextEncoder:
    return text_encoder(tokenizer)


# The same ids and positions


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, GPT_OSS, None, r"\p{L}+|\s+|'(?i:[sdmt]|ll|ve|re)"])
def test_ids_and_positions_are_those_of_tokenizers(pattern: str | None) -> None:
    tokenizer = small(pattern)
    encoder = text_encoder(tokenizer)
    assert encoder.engine == "tiktoken"
    assert encoder.engine == "tiktoken"
    for text in TEXTS:
        require_same(tokenizer, encoder, text)


@settings(max_examples=300, deadline=None)
@given(text=texts_, data=st.data())
def test_any_text(tokenizer: Tokenizer, encoder: TextEncoder, text: str, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(0, len(text)), max_size=5).map(sorted))  # repeated ones too
    require_same(tokenizer, encoder, text, points)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.sampled_from(["", *ADDED]).flatmap(lambda token: texts_.map(token.__add__)), max_size=6))
def test_texts_together_are_as_each_by_itself(encoder: TextEncoder, texts: list[str]) -> None:
    texts = [*texts, "<think>\ud800"]  # half of a surrogate pair spoils no other
    points = [[*range(0, len(text) + 1, 2)] for text in texts]
    together = encoder.encode_all(texts, points)
    for text, places, tokens in zip(texts[:-1], points, together, strict=False):
        alone = encoder.encode_at(text, places)
        assert isinstance(tokens, bpe.Tokens)
        assert (tokens.ids.tolist(), *tokens[1:]) == (alone.ids.tolist(), *alone[1:])
    assert isinstance(together[-1], RowRejected)


@pytest.mark.parametrize(
    ("pattern", "grouped"),
    [
        (QWEN, r"(?:" + QWEN.removesuffix(r"|\s+(?!\S)|\s+") + r")|\s+(?!\S)|\s+"),
        (r"[|(]a|\||(?:b|c)d|e(?!\S)|f", r"(?:[|(]a|\||(?:b|c)d)|e(?!\S)|f"),
        (r"\p{L}+|\s+(?!\S)|.", r"\p{L}+|\s+(?!\S)|."),
        (r"\p{L}+|\s+", r"(?:\p{L}+|\s+)"),
    ],
)
def test_what_does_not_look_ahead_is_grouped(pattern: str, grouped: str) -> None:
    assert bpe._grouped(pattern) == grouped


def test_a_point_at_each_edge(encoder: TextEncoder) -> None:
    ids, first, straddled = encoder.encode_at("the<think>the", [0, 0, 1, 3, 10, 13, 13])
    assert len(ids) == 3
    assert first == [0, 0, 1, 1, 2, 3, 3]
    assert straddled == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "\u6cd5\ud800", "<think>\udc00"])
@pytest.mark.parametrize("is_proven", [True, False])
def test_half_of_a_surrogate_pair(text: str, is_proven: bool) -> None:
    tokenizer = small()
    if not is_proven:
        tokenizer.normalizer = normalizers.NFKC()
    encoder = text_encoder(tokenizer)
    assert (encoder.engine == "tiktoken") == is_proven
    with pytest.raises(RowRejected, match="bad_message: text that is not Unicode"):
        encoder.encode(text)


def test_text_that_nfc_changes_keeps_its_positions(tokenizer: Tokenizer, encoder: TextEncoder) -> None:
    text = "cafe\u0301 the<think>"
    ids, first, straddled = encoder.encode_at(text, [5, 9, 16])
    assert [tokenizer.id_to_token(token) for token in ids[first[0] : first[1]].tolist()] == ["\u0120the"]  # " the"
    assert first[2] == len(ids)
    assert not any(straddled)


@pytest.mark.parametrize("text", [" " * 1_000_000, " " * 1_000_000 + "x"])
def test_a_million_blanks(tokenizer: Tokenizer, encoder: TextEncoder, text: str) -> None:
    """Too deep for tiktoken's regex engine."""
    require_same(tokenizer, encoder, text, [0, 5, len(text)])


@pytest.mark.parametrize("unit", ["a", "\u6cd5", "1", "\r\n", "ab", "!"])
def test_long_runs(tokenizer: Tokenizer, encoder: TextEncoder, unit: str) -> None:
    require_same(tokenizer, encoder, unit * 30_000, [0, 7, 30_000])


def test_text_on_which_tokenizers_panics(capfd: pytest.CaptureFixture[str]) -> None:
    encoder = text_encoder(small())
    with pytest.raises(RowRejected, match="bad_message: text that the tokenizer fails on"):
        encoder.encode(" " * 11_000_000 + "x")


def test_other_exceptions_pass() -> None:
    class Stopped:
        def encode(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bpe.encode_by(Stopped(), "a")  # type: ignore[arg-type]


def test_text_in_no_word_is_kept() -> None:
    """tiktoken drops what its pattern does not match; `tokenizers` keeps it as words of its own."""
    tokenizer = small(r"\p{L}+")
    encoder = text_encoder(tokenizer)
    assert encoder.engine == "tiktoken"
    for text in TEXTS:
        require_same(tokenizer, encoder, text)


def test_blanks_belong_to_their_token_though_offsets_are_trimmed() -> None:
    tokenizer = small(None)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    assert tokenizer.encode("the the").offsets[1] == (4, 7)
    for normalizer in (normalizers.NFC(), normalizers.NFKC()):
        tokenizer.normalizer = normalizer
        ids, first, straddled = text_encoder(tokenizer).encode_at("the the", [3, 4])
        assert len(ids) == 2
        assert (first, straddled) == ([1, 2], [False, True])


# How long a text is


def test_surely_longer(encoder: TextEncoder) -> None:
    longest = max(len("<|im_start|>"), encoder._max_token_bytes)
    assert encoder.is_surely_longer("a" * (10 * longest + 1), 10)
    assert not encoder.is_surely_longer("<|im_start|>" * 10, 10)
    assert encoder.is_surely_longer("\u6cd5" * (30 * longest + 1), 10)
    assert not encoder.is_surely_longer("\u1112\u1161\u11ab" * 10 * longest, 10)
    unproven = small()
    unproven.normalizer = normalizers.NFKC()
    assert not text_encoder(unproven).is_surely_longer("a" * 10_000, 1)


def test_nfc_shrinks_no_text_more_than_assumed() -> None:
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x30000)]):
        composed = unicodedata.normalize("NFC", character)
        longest = max(len(unicodedata.normalize("NFD", character).encode()), len(character.encode()))
        assert longest <= bpe._NFC_SHRINKS * len(composed.encode())


# The copy


def test_one_encoder_for_each_content(chatml_tokenizer: Any) -> None:
    first = small()
    encoder = text_encoder(first)
    assert text_encoder(small()) is encoder
    first.enable_truncation(3)
    first.enable_padding(length=9)
    assert text_encoder(first) is encoder
    first.add_tokens(["<new>"])
    other = text_encoder(first)
    assert other is not encoder
    assert len(other.encode("the <new> the the the the")) > 3
    chatml_tokenizer("the", truncation=True, max_length=1, padding="max_length", split_special_tokens=True)
    ids = text_encoder(chatml_tokenizer.backend_tokenizer).encode("<|im_end|>the quick brown fox")
    assert ids.tolist() == chatml_tokenizer("<|im_end|>the quick brown fox", add_special_tokens=False)["input_ids"]


def test_changes_of_the_original_do_not_reach_the_copy() -> None:
    tokenizer = small()
    encoder = text_encoder(tokenizer)
    before = encoder.encode("cafe\u0301 <think> the").tolist()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(1)
    assert encoder.encode("cafe\u0301 <think> the").tolist() == before


def test_old_encoders_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_made", {})
    monkeypatch.setattr(bpe, "_make", lambda own, fields: TextEncoder(own, "not tried"))
    for number in range(bpe._MAX_MADE + 3):
        text_encoder(small(added=[f"<{number}>"]))
    assert len(bpe._made) == bpe._MAX_MADE


# What is refused


def add(*tokens: AddedToken) -> Callable[[Tokenizer], Tokenizer]:
    def change(tokenizer: Tokenizer) -> Tokenizer:
        tokenizer.add_tokens(list(tokens))
        return tokenizer

    return change


def set_model(**options: Any) -> Callable[[Tokenizer], Tokenizer]:
    return lambda tokenizer: changed(tokenizer, lambda fields: fields["model"].update(options))


def set_field(**options: Any) -> Callable[[Tokenizer], Tokenizer]:
    return lambda tokenizer: changed(tokenizer, lambda fields: fields.update(options))


def set_part(part: str, value: Callable[[], Any]) -> Callable[[Tokenizer], Tokenizer]:
    def change(tokenizer: Tokenizer) -> Tokenizer:
        setattr(tokenizer, part, value())
        return tokenizer

    return change


def swap_first_merges(tokenizer: Tokenizer) -> Tokenizer:
    def change(fields: dict[str, Any]) -> None:
        merges = fields["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    return changed(tokenizer, change)


def drop_last_merge(tokenizer: Tokenizer) -> Tokenizer:
    return changed(tokenizer, lambda fields: fields["model"]["merges"].pop())


def new_token(text: str, number: int) -> Callable[[Tokenizer], Tokenizer]:
    return lambda tokenizer: changed(tokenizer, lambda fields: fields["model"]["vocab"].update({text: number}))


def collide(tokenizer: Tokenizer) -> Tokenizer:
    """An added token is numbered by the size of the vocabulary, gaps or not."""

    def change(fields: dict[str, Any]) -> None:
        letters = sorted(token for token in fields["model"]["vocab"] if len(token) == 1)
        ids = {letter: number for number, letter in enumerate(letters)}
        fields["model"].update(vocab={**ids, "ab": len(ids) + 1}, merges=[["a", "b"]])
        fields["added_tokens"] = []

    tokenizer = changed(tokenizer, change)
    tokenizer.add_tokens(["<x>"])
    return tokenizer


def without_byte(tokenizer: Tokenizer) -> Tokenizer:
    def change(fields: dict[str, Any]) -> None:
        fields["added_tokens"] = []
        del fields["model"]["vocab"]["\u00fe"]

    return changed(tokenizer, change)


SPACE = AddedToken("<x>", lstrip=True, normalized=False)
NOTHING = r"\p{L}*|\S|\s"
STEPS = "does not cut text into words by one regular expression"
CONSTRUCTS = "constructs that regex engines read in different ways"
REFUSED: list[tuple[Callable[[Tokenizer], Tokenizer], str]] = [
    (lambda _: Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")), "its model is WordLevel"),
    (set_model(dropout=0.1), "its model has dropout"),
    (set_model(unk_token="a"), "its model has unk_token"),
    (set_model(byte_fallback=True), "its model has byte_fallback"),
    (set_model(end_of_word_suffix="</w>", merges=[]), "its model has end_of_word_suffix"),
    (set_part("normalizer", normalizers.NFKC), "its normalizer is NFKC"),
    (set_part("normalizer", normalizers.Lowercase), "its normalizer is Lowercase"),
    (set_part("normalizer", lambda: normalizers.Sequence([normalizers.NFC()])), "its normalizer is Sequence"),
    (set_field(pre_tokenizer=None), "not byte-level"),
    (set_part("pre_tokenizer", pre_tokenizers.Whitespace), "not byte-level"),
    (set_part("pre_tokenizer", pre_tokenizers.Metaspace), "not byte-level"),
    (set_part("pre_tokenizer", lambda: pre_tokenizers.ByteLevel(add_prefix_space=True)), "puts a blank before text"),
    (set_part("pre_tokenizer", lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)), STEPS),
    (
        set_part(
            "pre_tokenizer",
            lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
        ),
        STEPS,
    ),
    (set_part("pre_tokenizer", lambda: split_by(r"\s+", "removed")), STEPS),
    (set_part("pre_tokenizer", lambda: split_by(r"\s+", "merged_with_previous")), STEPS),
    (set_part("pre_tokenizer", lambda: split_by(QWEN, invert=True)), STEPS),
    *[
        (set_part("pre_tokenizer", lambda pattern=pattern: split_by(pattern)), CONSTRUCTS)  # type: ignore[misc]
        for pattern in (
            *(r"\w+|\W", r"\h+|.", r"^a|\S|\s", r"a$|\S|\s", r"[[:alpha:]]+|\S|\s", r"(?i:ss)|\S|\s", r"\bthe|\S|\s"),
            *(r"(?<=a)b|\S|\s", r"[a-c]++|\S|\s", r"\S+?|\s", r"\S{2}+|\s", r"(?:ab)*c|\S|\s", r"(?m).+|\n", r"."),
            *(r"[\p{L}&&\p{Lu}]|\S|\s", r"(a)|\S|\s", r"\p{Han}+|\S|\s", r"(?=a)|\S|\s", r"\d+|\S|\s", r"\x41|\S|\s"),
        )
    ],
    (set_part("pre_tokenizer", lambda: split_by(NOTHING)), "matches nothing, too"),
    (add(SPACE), "takes the blanks around it"),
    (add(AddedToken("<x>", rstrip=True)), "takes the blanks around it"),
    (add(AddedToken("<x>", single_word=True)), "only whole words"),
    (add(AddedToken("<thin"), AddedToken("ink>")), "two added tokens can overlap"),
    (add(AddedToken("<think>s")), "two added tokens can overlap"),
    (add(AddedToken("xx")), "two added tokens can overlap"),
    (add(AddedToken("x" + "y" * 300)), "empty, or very long"),
    (add(*[AddedToken(f"<{number}>") for number in range(2_001)]), "it has 2004 added tokens"),
    (add(AddedToken("e\u0301", normalized=True)), "not in NFC"),
    (add(AddedToken("\u00e9", normalized=True)), "shares its id with bytes of other text"),  # "é" writes byte E9
    (add(AddedToken("z", normalized=True)), "lacks some bytes"),
    (swap_first_merges, "not in the order of their results' ids"),
    (drop_last_merge, "its merges do not make every token"),
    (new_token("zqzq", 9_000), "its merges do not make every token"),
    (new_token("a b", 9_000), "not made of bytes"),
    (new_token("zqzq", 1 << 23), "its ids go up to"),
    (without_byte, "lacks some bytes"),
    (collide, "two of its tokens have the same id"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_refused(change: Callable[[Tokenizer], Tokenizer], reason: str) -> None:
    tokenizer = change(small())
    encoder = text_encoder(tokenizer)
    assert encoder.engine.startswith("tokenizers: ")
    assert reason in encoder.engine
    if tokenizer.model.__class__.__name__ == "BPE" and not tokenizer.model.dropout:
        for text in ("the quick e\u0301 \u00e9 <x> <think>s", "xxx zz 12"):
            encoding = tokenizer.encode(text, add_special_tokens=False)
            assert encoder.encode(text).tolist() == encoding.ids


def test_ids_with_gaps_that_a_copy_closes() -> None:
    """The tokenizer itself is used, not its copy."""
    tokenizer = changed(small(added=[]), lambda fields: fields["model"]["vocab"].update({"zq": 1_000}))
    tokenizer.add_tokens(["zq"])
    tokenizer.add_tokens(["<x>"])
    encoder = text_encoder(tokenizer)
    assert "another one when saved and loaded" in encoder.engine
    assert encoder.encode("a<x>zq").tolist() == tokenizer.encode("a<x>zq").ids


@pytest.mark.parametrize("twin", ["the", "\u0120the", "th"])
def test_two_tokens_of_one_id(twin: str) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["model"]["vocab"]["zqzq"] = fields["model"]["vocab"][twin]

    tokenizer = changed(small(), change)
    for _ in range(2):
        encoder = text_encoder(tokenizer)
        assert "another one when saved and loaded" in encoder.engine
        assert encoder.encode("the<think>zqzq").tolist() == tokenizer.encode("the<think>zqzq").ids
        tokenizer.enable_padding(length=1)


def test_ids_beyond_int32() -> None:
    fields = {"model": {"vocab": {"a": 2**31 + 5}}, "added_tokens": []}  # tokenizers takes half a minute for a real one
    with pytest.raises(TemplateError, match="the token id 2147483653; expected ids of at most 31 bits"):
        bpe._require_int32(fields)


def test_engines_of_other_unicode_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_made", {})
    monkeypatch.setattr(bpe.unicodedata, "category", lambda character: "Cn" if character in "\u0178\u0179" else "L")

    class Older(tiktoken.Encoding):
        def encode_ordinary(self, text: str) -> list[int]:
            return super().encode_ordinary(text.replace("\u0178", " "))

    monkeypatch.setattr(bpe.tiktoken, "Encoding", Older)
    assert "different versions of Unicode" in text_encoder(small()).engine


def test_what_is_tried_out_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_made", {})
    monkeypatch.setattr(bpe, "_require_same_merges", lambda *_: None)
    encoder = text_encoder(changed(small(), lambda fields: fields["model"]["merges"].clear()))
    assert encoder.engine == "tokenizers: tiktoken gave other ids in a self-test"


# What is accepted


def test_special_tokens_within_the_vocabulary() -> None:
    """As GPT-2 and many others have them: no merges make them."""
    tokenizer = small(None, special_tokens=["<s>", "</s>"], added=["<think>"])
    assert tokenizer.token_to_id("<s>") == 0
    encoder = text_encoder(tokenizer)
    assert encoder.engine == "tiktoken"
    for text in (*TEXTS, "<s>the</s><s><s", "s>"):
        require_same(tokenizer, encoder, text)


def test_a_sequence_within_a_sequence() -> None:
    tokenizer = small()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_by(QWEN)])
    assert text_encoder(tokenizer).engine == "tiktoken"


def test_words_that_are_looked_up_first() -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["model"]["ignore_merges"] = True
        fields["model"]["vocab"]["zqzq"] = 2_000

    tokenizer = changed(small(added=[]), change)
    encoder = text_encoder(tokenizer)
    assert encoder.engine == "tiktoken"
    assert encoder.encode("zqzq").tolist() == [2_000]
    assert len(encoder.encode("zqzqx")) == 5
    for text in (*TEXTS, "zqzq zqzq xzqzq", "zqzq\ne\u0301"):
        require_same(tokenizer, encoder, text)


def test_a_looked_up_word_that_two_tokens_would_come_to_by_rank() -> None:
    """`bca` of rank 300 is no merge, but tiktoken would join `bc` and `a`, which the merge of rank 301 brings about."""

    def change(fields: dict[str, Any]) -> None:
        letters = {token: number for token, number in fields["model"]["vocab"].items() if len(token) == 1}
        fields["model"].update(vocab={**letters, "bca": 300, "bc": 301}, merges=[["b", "c"]], ignore_merges=True)
        fields["added_tokens"] = []

    tokenizer = changed(small(), change)
    encoder = text_encoder(tokenizer)
    assert "its merges do not make every token" in encoder.engine
    assert len(encoder.encode("bcad")) == 3


def perturbed(rng: random.Random) -> Tokenizer:
    """A trained tokenizer in which something about its merges may be wrong."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + rng.randint(0, 25), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["".join(rng.choices("aabc", k=rng.randint(1, 12))) for _ in range(60)], trainer)
    fields = json.loads(tokenizer.to_str())
    vocabulary, merges = fields["model"]["vocab"], fields["model"]["merges"]
    fields["model"]["ignore_merges"] = rng.random() < 0.4
    longer = [token for token in vocabulary if len(token) > 1]
    kind = rng.randrange(7)
    if kind == 0 and merges:
        merges.insert(rng.randrange(len(merges)), merges.pop(rng.randrange(len(merges))))
    elif kind == 1 and merges:
        del merges[rng.randrange(len(merges))]
    elif kind == 2 and longer:
        token = rng.choice(longer)
        cut = rng.randrange(1, len(token))
        at = next(number for number, merge in enumerate(merges) if "".join(merge) == token)
        if token[:cut] in vocabulary and token[cut:] in vocabulary:
            merges.insert(at + rng.randint(0, 1), [token[:cut], token[cut:]])
    elif kind == 3:
        vocabulary.setdefault("".join(rng.choices("abc", k=rng.randint(2, 5))), len(vocabulary))
    elif kind == 4:
        ids = [vocabulary[token] for token in longer]
        rng.shuffle(ids)
        vocabulary.update(zip(longer, ids, strict=True))
        merges.sort(key=lambda merge: vocabulary["".join(merge)])
    return Tokenizer.from_str(json.dumps(fields))


def test_random_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_made", {})
    monkeypatch.setattr(bpe, "_require_same_characters", lambda pattern: None)  # 0.1 s each
    rng = random.Random(7)
    engines = []
    for _ in range(150):
        tokenizer = perturbed(rng)
        encoder = text_encoder(tokenizer)
        engines.append(encoder.engine)
        if encoder.engine == "tiktoken":
            for _ in range(60):
                text = "".join(rng.choices("aaabbc ", k=rng.choice([3, 7, 12, 30, 700])))
                assert encoder.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert 20 < engines.count("tiktoken") < 140
    assert "tokenizers: tiktoken gave other ids in a self-test" not in engines  # the proof alone has refused it


# Both regex engines


def matched_by_tiktoken(pattern: str, text: str) -> bytes:
    """What a pattern matches, end to end: tiktoken drops the rest."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return bytes(encoding.encode_ordinary(text))


def matched_by_tokenizers(pattern: str, text: str) -> bytes:
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return "".join(part for part, _ in split.pre_tokenize_str(text)).encode()


@pytest.mark.slow
def test_classes_hold_the_same_of_all_code_points() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    letters = [rf"\p{{{name}}}" for name in ("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S")]
    for characters in (*letters, r"\P{L}", r"\s", r"\S", r"[^\r\n\p{L}\p{N}]", r"[^\s\p{L}\p{N}]"):
        matched = matched_by_tiktoken(f"{characters}+", text)
        assert matched == matched_by_tokenizers(f"{characters}+", text), characters
        assert matched
    cased = [c for c in text if c != c.lower() or c != c.upper() or c != c.casefold()]
    endings = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    for probe in ("'{}", "'{}e", "'{}l", "'r{}", "'v{}", "'l{}", "{}s"):
        probes = "".join(probe.format(c) for c in (text if probe == "'{}" else cased))
        assert matched_by_tiktoken(endings, probes) == matched_by_tokenizers(endings, probes)


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, GPT_OSS, bpe._GPT2_WORDS])
def test_cuts_at_every_edge_between_categories(pattern: str) -> None:
    """Cuts of both where Unicode's category changes from one code point to the next, in several surroundings.

    tiktoken looks a word up before it merges: with ranks for all that a text holds, each word is one token.
    """
    every = list(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    edges = {c for pair in pairwise(every) if len({*map(unicodedata.category, pair)}) == 2 for c in pair}
    edges |= {c for c in every if c.isspace()}
    probes = ("a{0}a", " {0}!", "'{0}1", "\n{0}{0} \n")
    texts = [probe.format(c) for c in sorted(edges) for probe in probes]
    known = {text[a:b].encode() for text in texts for a in range(len(text)) for b in range(a + 1, len(text) + 1)}
    known |= {bytes([byte]) for byte in range(256)}
    ranks = {token: number for number, token in enumerate(sorted(known))}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in texts:
        ours = [encoding.decode_single_token_bytes(token).decode() for token in encoding.encode_ordinary(text)]
        assert ours == [part for part, _ in split.pre_tokenize_str(text)], (text, ours)


# Qwen3


def test_qwen3_is_converted(assets: Path) -> None:
    tokenizer = Tokenizer.from_file(str(assets / "qwen3-tokenizer" / "tokenizer.json"))
    encoder = text_encoder(tokenizer)
    assert encoder.engine == "tiktoken"
    for text in TEXTS:
        require_same(tokenizer, encoder, text)
    rows = pq.read_table(assets / "data" / "openhermes_sample.parquet").to_pylist()[::37]
    for row in rows:
        text = "".join(f"<|im_start|>{turn['from']}\n{turn['value']}<|im_end|>\n" for turn in row["conversations"])
        require_same(tokenizer, encoder, text, range(0, len(text) + 1, 7))
    assert len(rows) > 400
