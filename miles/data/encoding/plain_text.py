"""Decides which special tokens stand around plain text, and which of its tokens are trained.

    "A larch."                     ->  <s> A larch. </s>
    "<s>[INST] … A larch.</s>\\n"  ->  <s> [INST] … A larch. </s> \\n    it was rendered beforehand

Text that was rendered beforehand brings its own markers. What the tokenizer puts before a text
(BOS), and EOS after it, is added where the text has not got it. A text has its end if, but for
white space, it ends in one of the end tokens (`end_ids`).

All is trained but what stands before the text, a BOS of the text's own, and the white space after
its end token, which a model never writes.

Under `special_text="escape"` the text's own markers are ordinary text, so both are added; under
"reject" such a text is rejected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from miles.common import storage
from miles.common.untrusted_files import require_readable
from miles.data.tokens.carried_tokenizer import CarriedTokenizer
from miles.data.tokens.text_encoder import TextEncoder
from miles.data.types import Int32, UInt8
from miles.errors import MilesError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class TextFrame:
    """The special tokens around plain text."""

    before: tuple[int, ...]
    """ids that the tokenizer puts before a text"""
    after: tuple[int, ...]
    """ids after it: the tokenizer's own, and EOS"""
    bos: int | None
    ends: tuple[tuple[int, str], ...]
    """id and text of each token that ends a text"""

    def around(self, text: str, ids: Int32) -> tuple[Int32, UInt8]:
        """Return the ids of a text with what it lacks before and after, and the loss mask.

        Args:
            text: the plain text.
            ids: int32 [tokens], of the text alone.
        """
        before = self._missing_before(ids)
        end = self._end_of(text, ids)
        after = self.after
        if end is not None:
            end_ids = [token for token, _ in self.ends]
            after = tuple(token for token in after if token not in end_ids)

        all_ids = np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)])
        loss_mask = np.ones(len(all_ids), np.uint8)
        num_own = len(self.before) - len(before)  # of these, the text brings its own
        loss_mask[: len(before) + num_own] = 0
        if len(ids) and ids[0] == self.bos:
            loss_mask[: len(before) + 1] = 0
        if end is not None:
            loss_mask[len(before) + end + 1 : len(before) + len(ids)] = 0
        return all_ids.astype(np.int32), loss_mask

    def _missing_before(self, ids: Int32) -> tuple[int, ...]:
        """Return the ids before a text of which it has none itself: their longest start."""
        for length in range(len(self.before), 0, -1):
            own = self.before[-length:]
            if ids[:length].tolist() == list(own):
                return self.before[:-length]
        return self.before

    def _end_of(self, text: str, ids: Int32) -> int | None:
        """Return which token ends the text; None if the text has no end of its own."""
        stripped = text.rstrip()
        for token, content in self.ends:
            if stripped.endswith(content):
                places = np.flatnonzero(ids == token)
                return int(places[-1]) if len(places) else None  # escaped, it is ordinary text
        return None


def text_frame(
    tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, url: str, terminator: str
) -> TextFrame:
    """Return what stands around plain text.

    Args:
        url: the tokenizer's folder, or its hub name.
        terminator: the text that ends an assistant turn of the chat template.
    """
    bare = encoder.backend.encode("a", add_special_tokens=False).ids
    full = encoder.backend.encode("a", add_special_tokens=True).ids
    begin = next(at for at in range(len(full)) if full[at : at + len(bare)] == bare)
    after = full[begin + len(bare) :]
    eos = tokenizer.eos_token_id
    if eos is not None and eos not in after:
        after = [*after, eos]

    ends = end_tokens(tokenizer, url, encoder.encode(terminator).tolist())
    return TextFrame(tuple(full[:begin]), tuple(after), tokenizer.bos_token_id, tuple(ends.items()))


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, url: str, terminator_ids: Sequence[int]
) -> dict[int, str]:
    """Return the id and the text of each token that ends a text."""
    ends: dict[int, str] = {}
    for token in end_ids(tokenizer.eos_token_id, terminator_ids, _serving_ends(tokenizer, url)):
        content = tokenizer.convert_ids_to_tokens(token)
        if isinstance(content, str) and token in tokenizer.added_tokens_decoder:
            ends[token] = content
    return ends


def end_ids(
    eos: int | None, terminator_ids: Sequence[int], generation_ends: Sequence[int]
) -> list[int]:
    """Return the tokens that end a text.

    These are the tokenizer's EOS, the last token of the chat template's terminator (Llama 3 ends a
    turn by <|eot_id|>, and a text by <|end_of_text|>), and those at which a server stops.
    """
    found = [*([] if eos is None else [eos]), *terminator_ids[-1:], *generation_ends]
    return list(dict.fromkeys(found))


def _serving_ends(tokenizer: PreTrainedTokenizerBase | CarriedTokenizer, url: str) -> Sequence[int]:
    if isinstance(tokenizer, CarriedTokenizer):  # read where it was certified
        return tokenizer.facts.serving_ends
    return read_serving_ends(url)


def read_serving_ends(url: str) -> list[int]:
    """Return the end tokens in the generation_config.json beside a tokenizer, if there is one."""
    try:
        path = storage.join(url, _GENERATION_CONFIG)
        if not (storage.is_folder(url) and storage.exists(path)):
            return []
        require_readable(path, TemplateError)
        ends = json.loads(storage.read_bytes(path))["eos_token_id"]
    except (MilesError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # no such file, or one that says nothing that can be read
    ends = ends if isinstance(ends, list) else [ends]
    return [token for token in ends if type(token) is int]
