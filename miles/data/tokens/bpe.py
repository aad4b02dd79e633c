"""A tokenizer -> its `TextEncoder`: by fastokens or tiktoken where that is proven exact.

A tokenizer that `bpe_proof` proves to be tiktoken's goes through tiktoken, which is several times
as fast; one that `fastokens_proof` proves to be fastokens's, too, through fastokens. The proof is
then tried on every added token, random Unicode, code, runs of blanks and digits. A tokenizer that
fails any of these is used as it is, unless an engine was asked for by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import xxhash

from miles.data.tokens.bpe_proof import Inexact, Proven, prove
from miles.data.tokens.carried_tokenizer import CarriedTokenizer
from miles.data.tokens.engines import (
    FASTOKENS,
    TIKTOKEN,
    TOKENIZERS,
    FastokensCore,
    engine_from,
    is_installed,
)
from miles.data.tokens.fastokens_proof import require_proven
from miles.data.tokens.packed_proof import PackedProof
from miles.data.tokens.text_encoder import TextEncoder, by_offsets
from miles.errors import ConfigError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
_ASKED = "as --tokenizer-engine asks"
_MAX_ENCODERS = 8

_SELF_TEST_SEED = 20_260_101


_encoders: dict[str, TextEncoder] = {}
"""hash of a tokenizer's content -> its encoder; the oldest make room"""


def text_encoder(backend: tokenizers.Tokenizer, choice: str = AUTO) -> TextEncoder:
    """Return the encoder for a tokenizer.

    It is made and tried once in a process for each content, whatever the object.

    Args:
        choice: `EncodeConfig.tokenizer_engine`.

    Raises:
        TemplateError: ids that int32 cannot hold.
        ConfigError: the engine that is asked for cannot be used.
    """
    definition = _definition_of(backend)
    key = choice + xxhash.xxh3_128_hexdigest(definition.encode())
    if key in _encoders:
        return _encoders[key]

    fields = json.loads(definition)
    _require_int32(fields)
    if _stop_trimming(fields["post_processor"]):
        definition = json.dumps(fields)

    # A copy, which changes by others do not reach.
    own = _read(definition)
    if own is None or not _is_copy(own, backend, fields):
        reason = "it is another one when saved and loaded (its ids have gaps or twins)"
        if choice != TOKENIZERS:
            _require_free_choice(choice, f"of this tokenizer, {reason}")
        return TextEncoder(backend, f"{TOKENIZERS}: {reason}")

    encoder = _make(own, fields, choice)
    while len(_encoders) >= _MAX_ENCODERS:
        _encoders.pop(next(iter(_encoders)), None)
    _encoders[key] = encoder
    return encoder


def text_encoder_of(
    tokenizer: PreTrainedTokenizerBase | CarriedTokenizer, choice: str = AUTO
) -> TextEncoder:
    """Return the encoder of a tokenizer of transformers, or of one that was carried here with it.

    Args:
        choice: `EncodeConfig.tokenizer_engine`; what was carried here was made under it.

    Raises:
        TemplateError: as from `text_encoder`.
    """
    if isinstance(tokenizer, CarriedTokenizer):
        return tokenizer.text_encoder
    return text_encoder(tokenizer.backend_tokenizer, choice)


def _definition_of(backend: tokenizers.Tokenizer) -> str:
    """Return a tokenizer as JSON, without truncation and padding, which are of its last call."""
    definition = backend.to_str()
    if backend.truncation is None and backend.padding is None:
        return definition
    bare = _read(definition)
    if bare is None:
        return definition
    bare.no_truncation()
    bare.no_padding()
    return bare.to_str()


def _make(own: tokenizers.Tokenizer, fields: Mapping[str, Any], choice: str) -> TextEncoder:
    """Make the encoder by the fastest engine that is proven, or by the one that is asked for.

    Raises:
        ConfigError: the one that is asked for is not proven, or not installed.
    """
    if choice == TOKENIZERS:
        return TextEncoder(own, f"{TOKENIZERS}: {_ASKED}")
    try:
        encoder = _convert(own, fields)
        _try_out(encoder)
    except Inexact as reason:
        _require_free_choice(choice, f"the tokenizer is not proven to be tiktoken's: {reason}")
        return TextEncoder(own, f"{TOKENIZERS}: {reason}")

    if choice == TIKTOKEN:
        return encoder
    if choice == AUTO:
        return faster_where_proven(encoder)
    try:
        return _with_fastokens(encoder)
    except Inexact as reason:
        _require_free_choice(choice, str(reason))
        raise


def faster_where_proven(encoder: TextEncoder) -> TextEncoder:
    """Return what "auto" takes, for an encoder that "tiktoken" gave."""
    try:
        return _with_fastokens(encoder)
    except Inexact as reason:
        return replace(encoder, engine=f"{TIKTOKEN}, not {FASTOKENS}: {reason}")


def _require_free_choice(choice: str, reason: str) -> None:
    if choice != AUTO:
        raise ConfigError(
            f"--tokenizer-engine {choice} cannot be used: {reason}; leave the flag out, and the "
            "fastest engine that is proven for the tokenizer is taken"
        )


def _with_fastokens(encoder: TextEncoder) -> TextEncoder:
    """Return an encoder of the same tokenizer by fastokens.

    Raises:
        Inexact: it is not installed, or not proven for this tokenizer.
    """
    if not is_installed():
        raise Inexact("it is not installed (pip install 'miles[fast]')")
    assert encoder.proof is not None
    core = engine_from(*encoder.proof.unpack(), FASTOKENS)
    assert isinstance(core, FastokensCore)
    require_proven(core)
    faster = replace(encoder, engine=FASTOKENS, _engine_core=core)
    _try_out(faster)
    return faster


def _read(definition: str) -> tokenizers.Tokenizer | None:
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception:  # of tokenizers' own making: what it wrote lacks a token of some merge
        return None


def _require_int32(fields: Mapping[str, Any]) -> None:
    vocabulary = fields["model"].get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    largest = max([*ids, *(token["id"] for token in fields["added_tokens"])], default=0)
    if largest > np.iinfo(np.int32).max:
        raise TemplateError(
            f"the tokenizer has the token id {largest}; expected ids of at most 31 bits"
        )


def _is_copy(
    own: tokenizers.Tokenizer, backend: tokenizers.Tokenizer, fields: Mapping[str, Any]
) -> bool:
    """Return whether a tokenizer was written and read without a change.

    `tokenizers` 0.23 writes one of two tokens with the same id, and reads added tokens with ids of
    its choice.
    """
    return own.get_vocab_size() == backend.get_vocab_size() and all(
        own.token_to_id(token["content"]) == token["id"] for token in fields["added_tokens"]
    )


def _stop_trimming(post_processor: Any) -> bool:
    """Set `trim_offsets` off: a token's blanks are part of it. Return whether any was on."""
    if not isinstance(post_processor, dict):
        return False
    trims = bool(post_processor.get("trim_offsets"))
    if trims:
        post_processor["trim_offsets"] = False
    return any([trims, *(_stop_trimming(step) for step in post_processor.get("processors", ()))])


def _convert(backend: tokenizers.Tokenizer, definition: Mapping[str, Any]) -> TextEncoder:
    proven = prove(backend, definition)
    has_normalizer = backend.normalizer is not None
    return encoder_from_proof(
        backend, proven, PackedProof.of(proven), has_normalizer=has_normalizer
    )


def encoder_from_proof(
    backend: Any,
    proven: Proven,
    packed: PackedProof,
    *,
    has_normalizer: bool,
    kind: str = TIKTOKEN,
    engine: str = "",
) -> TextEncoder:
    """Return the encoder for a tokenizer that is proven to be tiktoken's. Prove nothing again.

    Args:
        backend: the tokenizer of `tokenizers`, or one that is made when it is first used.
        proven, packed: the proof, and the same as arrays.
        has_normalizer: of the tokenizer.
        kind: "tiktoken", or "fastokens" where that is proven, too.
        engine: the certificate's words for it; "": the kind.

    Raises:
        Inexact: the engine does not take it.
    """
    core = engine_from(*proven, kind)
    _, ranks, added = proven
    token_bytes = np.zeros(max([*ranks.values(), *added.values()]) + 1, np.int64)
    token_bytes[packed.token_ids] = packed.token_lengths
    for text, rank in added.items():
        token_bytes[rank] = len(text.encode())

    return TextEncoder(
        backend,
        engine or kind,
        core,
        frozenset(added),
        token_bytes,
        int(token_bytes.max()),
        _has_normalizer=has_normalizer,
        proof=packed,
    )


def _try_out(encoder: TextEncoder) -> None:
    """Compare an engine with `tokenizers` on texts; raise `Inexact` where they differ."""
    texts = list(_self_test_texts(sorted(encoder._added)))
    normal = compress(texts, encoder._are_normal(texts))
    for text in [*texts, "".join(normal)]:
        points = list(range(0, len(text) + 1, 3))
        encoding = encoder.backend.encode(text, add_special_tokens=False)
        ids, first, straddled = encoder.encode_at(text, points)
        if ids.tolist() != encoding.ids or (first, straddled) != by_offsets(
            encoding.offsets, points
        ):
            raise Inexact(f"{encoder.kind} gave other ids in a self-test")


def _self_test_texts(added: Sequence[str]) -> Iterator[str]:
    """Yield texts on which an engine and `tokenizers` are compared: the same ones every time."""
    yield from (
        "",
        "def f(x):\n\treturn {'a': x[0] ** 2, \"b\": not x}  # don't\r\n\r\n\n  if __name__ == "
        "'__main__':\n    f(1)\n",
        "It's we'll I'M YOU'RE he'd 'S 'ſ 'K's ''s 've\u00a0'T",
        "e\u0301 \u1100\u1161\u11a8 \u212b \u0958 ﬁ İ ß ǅ ½ ² Ⅷ ٣ 三 \u200b\u200d \ufeff \ufffd "
        "\ufdd0 \U0010ffff",
        "法国的首都是哪里？ 日本語のテキスト 한국어 हिन्दी العربية ไทย 👩‍👩‍👧 🇩🇪 ☕️",
        "x\u0085y\u2028z\u2029\u000b\u000c\u001c\u3000\u1680\u180e.",
        *(
            "".join(blank * count + "a" for count in (1, 2, 3, 5, 8, 13, 40))
            for blank in (" ", "\n", "\t", "\r\n", " \n")
        ),
        " " * 200 + "\n" * 70 + "\t" * 35 + " ",
        " ".join("1234567890" * count for count in (1, 2, 7)) + " -3.14e+10 1,000,000 ١٢٣",
    )
    yield from (f"a{token}b {token}{token}\n{token[:-1]}{token[1:]} {token}." for token in added)

    random = np.random.Philox(key=_SELF_TEST_SEED)
    kinds = (0x80, 0x250, 0x3000, 0xD800, 0x20000)  # so that each script is met at some size
    for number in range(200):
        raw = random.random_raw(48)
        top = kinds[number % len(kinds)]
        characters = (chr(int(value) % top) if int(value) >> 62 else " " for value in raw)
        yield "".join(
            character for character in characters if not "\ud800" <= character <= "\udfff"
        )
