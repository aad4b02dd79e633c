"""fastokens encodes only where it is proven, and a difference is found wherever it begins."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, normalizers

from miles.data.tokens import bpe, engines, fastokens_proof
from miles.data.tokens.bpe import text_encoder
from miles.data.tokens.bpe_proof import GPT2_WORDS, Inexact
from miles.data.tokens.engines import FastokensCore, engine_from
from miles.data.tokens.sample_check import check_sample
from miles.data.tokens.text_encoder import TextEncoder
from miles.errors import ConfigError, RunError
from tests.support.byte_level import GPT_OSS, LLAMA3, QWEN, TEXTS, require_same, small
from tests.support.fault_table import SINCE, observed

pytest.importorskip("fastokens")


@pytest.fixture
def no_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders of other tests are not found."""
    monkeypatch.setattr(bpe, "_encoders", {})


def core_of(encoder: TextEncoder) -> FastokensCore:
    core = encoder._engine_core
    assert isinstance(core, FastokensCore)
    return core


def broken(core: FastokensCore) -> FastokensCore:
    """The engine with the ids of two tokens exchanged; tiktoken has the right ones."""
    ranks = {**core.ranks, b"{": core.ranks[b"}"], b"}": core.ranks[b"{"]}
    return FastokensCore(core.pattern, ranks, core.added, core.slow)


# Where it is proven


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, GPT_OSS])
def test_ids_are_those_of_tokenizers(pattern: str) -> None:
    tokenizer = small(pattern)
    encoder = text_encoder(tokenizer)
    assert encoder.engine == "fastokens"
    for text in (*TEXTS, "".join(TEXTS[3:8]) * 50):
        require_same(tokenizer, encoder, text, [0, len(text) // 2])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, GPT_OSS])
def test_words_are_cut_alike_at_all_code_points(pattern: str) -> None:
    core = engine_from(pattern, fastokens_proof._probing_ranks(), {"\0\0": 1 << 20}, "fastokens")
    assert isinstance(core, FastokensCore)
    points = [
        *range(0x17F),
        *range(0x180, 0xD800),
        *range(0xE000, 0x32000),
        *range(0xE0000, 0xE0200),
    ]
    for start in range(0, len(points), 50_000):
        text = fastokens_proof.characters_in_context(list(map(chr, points[start : start + 50_000])))
        assert fastokens_proof._is_same(core, text), hex(points[start])


def test_a_sequence_holds_all_of_its_length() -> None:
    text = fastokens_proof._sequences("abc", 3)
    assert len({text[at : at + 3] for at in range(27)}) == 27
    assert len(text) == 29


def test_long_words_are_not_mistaken_for_shorter_ones() -> None:
    """A word's length in 16 bits, or its first bytes alone, would not tell these apart."""
    core = core_of(text_encoder(small()))
    for length in (65_535, 65_536, 65_537, 65_538, 131_073):
        for ending in "abc":
            text = "a" * (length - 1) + ending
            assert fastokens_proof._is_same(core, text + " " + "b" * (length - 65_530))


def test_it_starts_no_threads_of_its_own(chatml_tokenizer: Any) -> None:
    encoder = text_encoder(chatml_tokenizer.backend_tokenizer, "fastokens")
    text = "the quick brown fox <|im_end|>\n 1234 " * 100_000
    assert core_of(encoder).ids(text) is not None
    names = {Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()}
    assert not any(name.startswith("fastokens") for name in names)


def test_rows_of_the_samples(assets: Path) -> None:
    tokenizer = Tokenizer.from_file(str(assets / "qwen3-tokenizer" / "tokenizer.json"))
    encoder = text_encoder(tokenizer)
    assert encoder.engine == "fastokens"
    for name in ("openhermes_sample", "glaive_tools_en"):
        column = pq.read_table(assets / "data" / f"{name}.parquet")["conversations"]
        texts = [
            "".join(f"<|im_start|>{turn['from']}\n{turn['value']}<|im_end|>\n" for turn in turns)
            for turns in column.to_pylist()[::3]
        ]
        assert tokenizer.normalizer is not None
        normal = [text for text in texts if tokenizer.normalizer.normalize_str(text) == text]
        expected = tokenizer.encode_batch_fast(normal, add_special_tokens=False)
        ids = core_of(encoder).ids("".join(normal))
        assert ids is not None
        assert ids.tolist() == [token for encoding in expected for token in encoding.ids]
        assert len(normal) > 0.9 * len(texts)


# It begins with tiktoken


def test_it_is_made_once_it_repays_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_REPAID_CHARACTERS", 100)
    proven = core_of(text_encoder(small()))
    core = engine_from(proven.pattern, proven.ranks, proven.added, "fastokens")
    assert isinstance(core, FastokensCore)
    text = "the quick <think>brown fox" * 2
    all_ids = []
    for is_made in (False, False, True):
        ids = core.ids(text)
        assert ids is not None
        all_ids.append(ids.tolist())
        assert ("fast" in vars(core)) == is_made
    assert all_ids[0] == all_ids[1] == all_ids[2]


def test_it_is_made_at_once_for_much_text() -> None:
    made = text_encoder(small())
    proven = core_of(made)
    core = engine_from(proven.pattern, proven.ranks, proven.added, "fastokens")
    replace(made, _engine_core=core).make_engine()
    assert "fast" in vars(core)


# Where it is not


def test_an_expression_that_was_not_tried(no_encoders: None) -> None:
    reason = "fastokens was never tried with its regular expression"
    assert text_encoder(small(None)).engine == f"tiktoken, not fastokens: {reason}"
    with pytest.raises(ConfigError, match=f"--tokenizer-engine fastokens cannot be used: {reason}"):
        text_encoder(small(None), "fastokens")


def test_a_scanner_that_cuts_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's expression goes to PCRE2 in fastokens 0.3.5, where U+180E is a blank."""
    monkeypatch.setattr(fastokens_proof, "_TRIED", (GPT2_WORDS,))
    encoder = text_encoder(small(None), "tiktoken")
    assert encoder.proof is not None
    core = engine_from(*encoder.proof.unpack(), "fastokens")
    assert isinstance(core, FastokensCore)
    with pytest.raises(Inexact, match="cuts text into other words"):
        fastokens_proof.require_proven(core)


@pytest.mark.parametrize("pattern", [QWEN, LLAMA3, GPT_OSS])
def test_the_long_s_is_left_to_tiktoken(pattern: str) -> None:
    """(?i:'s) holds it, which fastokens 0.3.5 does not know."""
    core = engine_from(pattern, fastokens_proof._probing_ranks(), {"\0\0": 1 << 20}, "fastokens")
    assert isinstance(core, FastokensCore)
    for text in ("a'\u017fa", "1'\u017fs", "\u017f'\u017fs"):
        expected = core.slow.ids(text)
        assert core.fast
        assert np.array_equal(core.ids(text), expected)
    assert not fastokens_proof._is_same(core, "a'\u017fa \u017f'\u017fs")


def test_not_installed(no_encoders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "is_installed", lambda: False)
    reason = r"it is not installed \(pip install 'miles\[fast\]'\)"
    with pytest.raises(ConfigError, match=reason):
        text_encoder(small(), "fastokens")
    encoder = text_encoder(small())
    assert encoder.kind == "tiktoken"
    assert encoder.engine.startswith("tiktoken, not fastokens: it is not installed")


@pytest.mark.parametrize("engine", ["fastokens", "tiktoken"])
def test_a_named_engine_that_is_not_proven(no_encoders: None, engine: str) -> None:
    tokenizer = small()
    tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ConfigError, match=f"--tokenizer-engine {engine} cannot be used: .*NFKC"):
        text_encoder(tokenizer, engine)


def test_tokenizers_when_asked() -> None:
    encoder = text_encoder(small(), "tokenizers")
    assert encoder.engine == "tokenizers: as --tokenizer-engine asks"
    require_same(small(), encoder, "the <think>quick brown fox")


# A broken engine


def test_the_proof_finds_a_wrong_rank() -> None:
    core = core_of(text_encoder(small()))
    with pytest.raises(Inexact, match="merges the bytes of a word in another way"):
        fastokens_proof.require_proven(broken(core))


def test_the_self_test_finds_a_wrong_rank(
    no_encoders: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., Any] = bpe.engine_from
    monkeypatch.setattr(bpe, "require_proven", lambda core: core.fast)
    monkeypatch.setattr(
        bpe,
        "engine_from",
        lambda *proof: broken(core) if isinstance(core := make(*proof), FastokensCore) else core,
    )
    with pytest.raises(ConfigError, match="fastokens gave other ids in a self-test"):
        text_encoder(small(), "fastokens")


def test_the_sample_of_a_step_finds_a_wrong_rank() -> None:
    encoder = text_encoder(small())
    core = broken(core_of(encoder))
    assert core.fast
    wrong = replace(encoder, _engine_core=core)
    texts = ["<|im_start|>{<|im_end|>}"] * 600
    points = [[0]] * len(texts)
    assert len(encoder.encode_all(texts, points)) == 600
    with pytest.raises(RunError) as found:
        wrong.encode_all(texts, points)
    fault = "engine that gives other ids than `tokenizers`"
    observed(fault, str(found.value), "--tokenizer-engine tiktoken", SINCE)


def test_a_sample_of_every_large_call() -> None:
    encoder = text_encoder(small())
    assert encoder.proof is not None
    added = encoder.proof.added
    texts = [f"<|im_start|>the {number}<|im_end|> fox" for number in range(600)]
    rightly = [encoder.encode(text) for text in texts]
    for count in (500, 501, 600):
        check_sample(encoder.backend, added, "tiktoken", texts[:count], rightly.__getitem__)
        with pytest.raises(RunError, match="--tokenizer-engine tokenizers"):
            check_sample(
                encoder.backend, added, "tiktoken", texts[:count], lambda n: rightly[n] + 1
            )
        with pytest.raises(RunError, match="gave other token ids"):
            check_sample(
                encoder.backend, added, "tiktoken", texts[:count], lambda n: np.zeros(0, np.int32)
            )
