"""A proof of `bpe_proof.py` as arrays, in which it travels from one process to another.

{b"a": 0, b"ab": 1}  ->  token_bytes [97, 97, 98], token_lengths [1, 2], token_ids [0, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from miles.common.offsets import offsets_of
from miles.data.tokens.bpe_proof import Proven
from miles.data.types import Int32, UInt8


@dataclass(frozen=True)
class PackedProof:
    """The parts of an engine: the expression that cuts words, and the tokens with their ids."""

    pattern: str
    added: Mapping[str, int]
    """added tokens -> ids"""
    token_bytes: UInt8
    """uint8 [bytes]: the model's tokens, end to end"""
    token_lengths: Int32
    """int32 [tokens]"""
    token_ids: Int32
    """int32 [tokens]"""

    @classmethod
    def of(cls, proven: Proven) -> PackedProof:
        """Pack a proof."""
        tokens = list(proven.ranks)
        return cls(
            proven.pattern,
            proven.added,
            np.frombuffer(b"".join(tokens), np.uint8),
            np.fromiter(map(len, tokens), np.int32, len(tokens)),
            np.fromiter(proven.ranks.values(), np.int32, len(tokens)),
        )

    def unpack(self) -> Proven:
        """Return the proof as it was."""
        joined = self.token_bytes.tobytes()
        edges = offsets_of(self.token_lengths).tolist()
        tokens = [joined[begin:end] for begin, end in pairwise(edges)]
        ranks = dict(zip(tokens, self.token_ids.tolist(), strict=True))
        return Proven(self.pattern, ranks, dict(self.added))
