"""A sample of what an engine encoded, compared with `tokenizers`: a difference ends the run.

    the texts of a step  ->  one of them, by a hash of the first  ->  one stretch of it, from an
    added token to the next  ->  the engine's ids against those of `tokenizers`

No merge crosses an added token, so a stretch has the same ids by itself. It takes a third of a
millisecond, most of it in `tokenizers`: 2 % of what encoding a thousand rows does. Of smaller calls
few are sampled: the first one reads the definition of the tokenizer for `tokenizers`, in half a
second, which a card of a few hundred rows is ready without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import tokenizers
import xxhash

from miles.data.types import Int32
from miles.errors import RunError

_ALWAYS_TEXTS = 500
"""A call of as many texts is always sampled: the tables of a stream have about 1,000."""
_ONE_TEXT_IN = 10_000
"""of smaller calls"""
_SHOWN_CHARACTERS = 80


def sampled(texts: Sequence[str]) -> int | None:
    """Return the number of the text that is compared, always the same of the same texts."""
    number = xxhash.xxh3_64_intdigest(texts[0].encode("utf-8", "surrogatepass"))
    if len(texts) < _ALWAYS_TEXTS and number % _ONE_TEXT_IN >= len(texts):
        return None
    return number % len(texts)


def check_sample(
    backend: tokenizers.Tokenizer,
    added: Mapping[str, int],
    engine: str,
    texts: Sequence[str],
    ids_of: Callable[[int], Int32],
) -> None:
    """Compare a stretch of one text with `tokenizers`.

    Args:
        added: added tokens -> ids.
        engine: what gave the ids.
        texts: that were encoded together, each normal.
        ids_of: number of a text -> its ids, int32 [tokens].

    Raises:
        RunError: the ids differ.
    """
    number = sampled(texts) if texts else None
    if number is None:
        return
    stretches = _stretches_of_text(texts[number], added)
    ids = _stretches_of_ids(ids_of(number), added)
    chosen = xxhash.xxh3_64_intdigest(texts[number].encode()) % len(stretches)
    stretch = stretches[chosen]
    expected = backend.encode(stretch, add_special_tokens=False).ids
    if len(ids) == len(stretches) and ids[chosen] == expected:
        return

    shown = stretch[:_SHOWN_CHARACTERS] + ("..." if len(stretch) > _SHOWN_CHARACTERS else "")
    raise RunError(
        f"--tokenizer-engine: {engine} gave other token ids than tokenizers, in the text "
        f"{shown!r} of row {number} of {len(texts)} that were encoded together; expected the same "
        f"ids, as in the proof at the start. Start again with --tokenizer-engine "
        f"{'tiktoken' if engine == 'fastokens' else 'tokenizers'}, which goes on from the last "
        "checkpoint, and report this text"
    )


def _stretches_of_text(text: str, added: Mapping[str, int]) -> list[str]:
    """Cut a text before each added token. Where several begin, the longest is the token."""
    if not added:
        return [text]
    starts = [found.start() for found in _any_of(tuple(added)).finditer(text)]
    edges = sorted({0, *starts, len(text)})
    return [text[begin:end] for begin, end in pairwise(edges)] or [text]


@lru_cache(maxsize=4)
def _any_of(added: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(added, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _stretches_of_ids(ids: Int32, added: Mapping[str, int]) -> list[list[int]]:
    """Cut ids before each added token's."""
    numbers = ids.tolist()
    added_ids = frozenset(added.values())
    # What comes before the first token is no stretch.
    starts = [place for place, number in enumerate(numbers) if place and number in added_ids]
    return [numbers[begin:end] for begin, end in pairwise([0, *starts, len(numbers)])]
