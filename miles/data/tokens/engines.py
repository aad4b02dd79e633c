"""The engines that give a text's ids, rebuilt from a proof: pattern, ranks, added tokens.

tiktoken    made in 0.1 seconds; 55 nanoseconds a byte
fastokens   made in 0.8 seconds, 100 MB; 4 nanoseconds a byte (an optional package)

So a process begins with tiktoken also where fastokens is used, and makes fastokens once it has
encoded as much as repays that; at once where it is known to encode much. Nothing is proven here:
`bpe.py` does that, once for a tokenizer.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken

from miles.data.tokens.bpe_proof import Inexact, grouped
from miles.data.types import Int32

TIKTOKEN = "tiktoken"
FASTOKENS = "fastokens"
TOKENIZERS = "tokenizers"

_REPAID_CHARACTERS = 16 << 20
"""Text after which making fastokens (0.8 s) has cost no more than going on without it."""
LONG_S = "\u017f"
"""A text with it is left to tiktoken. In `(?i:'s)` it is an s; fastokens 0.3.5 cuts 'ſo otherwise."""
_LONG_BLANKS = 1_000_000


class EngineCore(Protocol):
    """An encoder of text that is already normal, the texts of a step end to end."""

    kind: str
    """"tiktoken" or "fastokens\""""

    def ids(self, text: str) -> Int32 | None:
        """Return the ids of a text, int32 [tokens]; None: this engine gives up on it."""


def engine_from(
    pattern: str, ranks: Mapping[bytes, int], added: Mapping[str, int], kind: str
) -> EngineCore:
    """Make the engine of a tokenizer that is proven already.

    Args:
        pattern: the regular expression that cuts words.
        ranks: tokens of the model -> ids.
        added: added tokens -> ids.
        kind: "tiktoken" or "fastokens".

    Raises:
        Inexact: the engine does not take them.
    """
    slow = TiktokenCore(pattern, ranks, added)
    if kind == TIKTOKEN:
        return slow
    assert kind == FASTOKENS
    return FastokensCore(pattern, ranks, added, slow)


def is_installed() -> bool:
    """Return whether fastokens is installed here."""
    return importlib.util.find_spec(FASTOKENS) is not None


class TiktokenCore:
    """tiktoken's own core, whose call returns no Python object a token."""

    kind = TIKTOKEN

    def __init__(self, pattern: str, ranks: Mapping[bytes, int], added: Mapping[str, int]) -> None:
        try:
            encoding = tiktoken.Encoding(
                "miles",
                pat_str=grouped(pattern),
                mergeable_ranks=dict(ranks),
                special_tokens=dict(added),
                explicit_n_vocab=None,
            )
        except Exception as error:  # whatever its Rust side makes of what it does not take
            raise Inexact(f"tiktoken does not take it ({type(error).__name__})") from error
        self._core = encoding._core_bpe
        self._added = frozenset(added)

    def ids(self, text: str) -> Int32 | None:
        """Return the ids of a text; None if tiktoken gives up."""
        try:
            buffer = self._core.encode_to_tiktoken_buffer(text, self._added)
        except ValueError:
            # Not Unicode; or (tiktoken 0.14) the stack of fancy-regex is full, at a million blanks.
            return None
        return np.frombuffer(buffer, np.int32).copy()


@dataclass(eq=False)
class FastokensCore:
    """fastokens, made when it is worth its making; tiktoken until then."""

    pattern: str
    ranks: Mapping[bytes, int]
    added: Mapping[str, int]
    slow: TiktokenCore
    num_characters: int = 0
    """encoded so far, by tiktoken"""
    kind: str = field(default=FASTOKENS, init=False)

    @cached_property
    def fast(self) -> Any:
        """The tokenizer of fastokens.

        Raises:
            Inexact: fastokens does not take it.
        """
        # One thread: a loader has one core. fastokens reads this once, when it first splits work.
        os.environ["FASTOKENS_BPE_THREADS"] = "1"
        native = importlib.import_module("fastokens._native")
        try:
            with _ranks_file(self.ranks) as path:
                made = native.Tokenizer.from_tiktoken(path, self.pattern, dict(self.added))
        except Exception as error:  # whatever its Rust side makes of what it does not take
            raise Inexact(f"fastokens does not take it ({type(error).__name__})") from error
        made.enable_segment_cache(0)  # whatever the environment says: its cache of words is enough
        return made

    def make(self) -> None:
        """Make the tokenizer of fastokens now.

        Raises:
            Inexact: fastokens does not take it.
        """
        _ = self.fast

    def ids(self, text: str) -> Int32 | None:
        """Return the ids of a text; None if it is not Unicode, or has a million blanks in a row.

        There tiktoken gives up, and with ten million `tokenizers` fails: the row is rejected
        whichever the engine is.
        """
        if has_long_blanks(text):
            return None
        if "fast" not in vars(self) and self.num_characters < _REPAID_CHARACTERS:
            self.num_characters += len(text)
            return self.slow.ids(text)
        if LONG_S in text:
            return self.slow.ids(text)
        return self.fast_ids(text)

    def fast_ids(self, text: str) -> Int32 | None:
        """Return the ids that fastokens gives; None if the text is not Unicode."""
        try:
            buffer, _ = self.fast.encode_batch_flat([text])
        except UnicodeEncodeError:
            return None
        return np.frombuffer(buffer, np.int32).copy()


def has_long_blanks(text: str) -> bool:
    """Return whether a text has a run of blanks that is very long: always of `_LONG_BLANKS`."""
    step = _LONG_BLANKS // 2
    return len(text) >= _LONG_BLANKS and any(
        text[start : start + step].isspace() for start in range(0, len(text) - step + 1, step)
    )


@contextmanager
def _ranks_file(ranks: Mapping[bytes, int]) -> Iterator[str]:
    """Write ranks as a file of tiktoken's format, in memory where the system can; yield its path."""
    lines = [
        b"%b %d\n" % (base64.b64encode(token), rank)
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ranks")
            path.write_bytes(b"".join(lines))
            yield str(path)
        return

    with open(os.memfd_create("ranks"), "wb") as file:
        file.writelines(lines)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
