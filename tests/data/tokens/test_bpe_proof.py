"""What is proven goes through tiktoken; what is not is refused, and says why."""

import json
import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from miles.data.tokens import bpe, bpe_proof
from miles.data.tokens.bpe import text_encoder
from miles.errors import TemplateError
from tests.support.byte_level import (
    GPT_OSS,
    LLAMA3,
    QWEN,
    TEXTS,
    changed,
    require_same,
    small,
    split_by,
)


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
    assert bpe_proof.grouped(pattern) == grouped


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
    return lambda tokenizer: changed(
        tokenizer, lambda fields: fields["model"]["vocab"].update({text: number})
    )


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
    (
        lambda _: Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")),
        "its model is WordLevel",
    ),
    (set_model(dropout=0.1), "its model has dropout"),
    (set_model(unk_token="a"), "its model has unk_token"),
    (set_model(byte_fallback=True), "its model has byte_fallback"),
    (set_model(end_of_word_suffix="</w>", merges=[]), "its model has end_of_word_suffix"),
    (set_part("normalizer", normalizers.NFKC), "its normalizer is NFKC"),
    (set_part("normalizer", normalizers.Lowercase), "its normalizer is Lowercase"),
    (
        set_part("normalizer", lambda: normalizers.Sequence([normalizers.NFC()])),
        "its normalizer is Sequence",
    ),
    (set_field(pre_tokenizer=None), "not byte-level"),
    (set_part("pre_tokenizer", pre_tokenizers.Whitespace), "not byte-level"),
    (set_part("pre_tokenizer", pre_tokenizers.Metaspace), "not byte-level"),
    (
        set_part("pre_tokenizer", lambda: pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "puts a blank before text",
    ),
    (
        set_part(
            "pre_tokenizer",
            lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ),
        STEPS,
    ),
    (
        set_part(
            "pre_tokenizer",
            lambda: pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
            ),
        ),
        STEPS,
    ),
    (set_part("pre_tokenizer", lambda: split_by(r"\s+", "removed")), STEPS),
    (set_part("pre_tokenizer", lambda: split_by(r"\s+", "merged_with_previous")), STEPS),
    (set_part("pre_tokenizer", lambda: split_by(QWEN, invert=True)), STEPS),
    *[
        (set_part("pre_tokenizer", lambda pattern=pattern: split_by(pattern)), CONSTRUCTS)
        for pattern in (
            *(
                r"\w+|\W",
                r"\h+|.",
                r"^a|\S|\s",
                r"a$|\S|\s",
                r"[[:alpha:]]+|\S|\s",
                r"(?i:ss)|\S|\s",
                r"\bthe|\S|\s",
            ),
            *(
                r"(?<=a)b|\S|\s",
                r"[a-c]++|\S|\s",
                r"\S+?|\s",
                r"\S{2}+|\s",
                r"(?:ab)*c|\S|\s",
                r"(?m).+|\n",
                r".",
            ),
            *(
                r"[\p{L}&&\p{Lu}]|\S|\s",
                r"(a)|\S|\s",
                r"\p{Han}+|\S|\s",
                r"(?=a)|\S|\s",
                r"\d+|\S|\s",
                r"\x41|\S|\s",
            ),
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
    (
        add(AddedToken("\u00e9", normalized=True)),
        "shares its id with bytes of other text",
    ),  # "é" writes byte E9
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
    tokenizer = changed(
        small(added=[]), lambda fields: fields["model"]["vocab"].update({"zq": 1_000})
    )
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
    fields = {
        "model": {"vocab": {"a": 2**31 + 5}},
        "added_tokens": [],
    }  # tokenizers takes half a minute for a real one
    with pytest.raises(
        TemplateError, match="the token id 2147483653; expected ids of at most 31 bits"
    ):
        bpe._require_int32(fields)


def test_engines_of_other_unicode_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_encoders", {})
    monkeypatch.setattr(
        bpe_proof.unicodedata,
        "category",
        lambda character: "Cn" if character in "\u0178\u0179" else "L",
    )

    class Older(tiktoken.Encoding):
        def encode_ordinary(self, text: str) -> list[int]:
            return super().encode_ordinary(text.replace("\u0178", " "))

    monkeypatch.setattr(bpe_proof.tiktoken, "Encoding", Older)
    assert "different versions of Unicode" in text_encoder(small()).engine


def test_what_is_tried_out_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_encoders", {})
    monkeypatch.setattr(bpe_proof, "_require_same_merges", lambda *_: None)
    encoder = text_encoder(changed(small(), lambda fields: fields["model"]["merges"].clear()))
    assert encoder.engine == "tokenizers: tiktoken gave other ids in a self-test"


# What is accepted


def test_special_tokens_within_the_vocabulary() -> None:
    """As GPT-2 and many others have them: no merges make them."""
    tokenizer = small(None, special_tokens=["<s>", "</s>"], added=["<think>"])
    assert tokenizer.token_to_id("<s>") == 0
    encoder = text_encoder(tokenizer)
    assert encoder.kind != "tokenizers"
    for text in (*TEXTS, "<s>the</s><s><s", "s>"):
        require_same(tokenizer, encoder, text)


def test_a_sequence_within_a_sequence() -> None:
    tokenizer = small()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_by(QWEN)])
    assert text_encoder(tokenizer).kind != "tokenizers"


def test_words_that_are_looked_up_first() -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["model"]["ignore_merges"] = True
        fields["model"]["vocab"]["zqzq"] = 2_000

    tokenizer = changed(small(added=[]), change)
    encoder = text_encoder(tokenizer)
    assert encoder.kind != "tokenizers"
    assert encoder.encode("zqzq").tolist() == [2_000]
    assert len(encoder.encode("zqzqx")) == 5
    for text in (*TEXTS, "zqzq zqzq xzqzq", "zqzq\ne\u0301"):
        require_same(tokenizer, encoder, text)


def test_a_looked_up_word_differs_by_rank() -> None:
    """`bca` of rank 300 is no merge, but tiktoken would join `bc` and `a`, which the merge of rank
    301 brings about."""

    def change(fields: dict[str, Any]) -> None:
        letters = {
            token: number for token, number in fields["model"]["vocab"].items() if len(token) == 1
        }
        fields["model"].update(
            vocab={**letters, "bca": 300, "bc": 301}, merges=[["b", "c"]], ignore_merges=True
        )
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
        vocab_size=256 + rng.randint(0, 25),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["".join(rng.choices("aabc", k=rng.randint(1, 12))) for _ in range(60)], trainer
    )
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
    monkeypatch.setattr(bpe, "_encoders", {})
    monkeypatch.setattr(bpe_proof, "_require_same_characters", lambda pattern: None)  # 0.1 s each
    rng = random.Random(7)
    engines = []
    for _ in range(150):
        tokenizer = perturbed(rng)
        encoder = text_encoder(tokenizer)
        engines.append(encoder.engine)
        if encoder.kind != "tokenizers":
            for _ in range(60):
                text = "".join(rng.choices("aaabbc ", k=rng.choice([3, 7, 12, 30, 700])))
                assert (
                    encoder.encode(text).tolist()
                    == tokenizer.encode(text, add_special_tokens=False).ids
                )
    num_proven = sum(not engine.startswith("tokenizers") for engine in engines)
    assert 20 < num_proven < 140
    assert (
        "tokenizers: tiktoken gave other ids in a self-test" not in engines
    )  # the proof alone has refused it


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


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, GPT_OSS, bpe_proof.GPT2_WORDS])
def test_cuts_at_every_edge_between_categories(pattern: str) -> None:
    """Cuts of both where Unicode's category changes from one code point to the next, in several
    surroundings.

    tiktoken looks a word up before it merges: with ranks for all that a text holds, each word is
    one token."""
    every = list(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    edges = {
        c for pair in pairwise(every) if len({*map(unicodedata.category, pair)}) == 2 for c in pair
    }
    edges |= {c for c in every if c.isspace()}
    probes = ("a{0}a", " {0}!", "'{0}1", "\n{0}{0} \n")
    texts = [probe.format(c) for c in sorted(edges) for probe in probes]
    known = {
        text[a:b].encode()
        for text in texts
        for a in range(len(text))
        for b in range(a + 1, len(text) + 1)
    }
    known |= {bytes([byte]) for byte in range(256)}
    ranks = {token: number for number, token in enumerate(sorted(known))}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in texts:
        ours = [
            encoding.decode_single_token_bytes(token).decode()
            for token in encoding.encode_ordinary(text)
        ]
        assert ours == [part for part, _ in split.pre_tokenize_str(text)], (text, ours)


# Qwen3
