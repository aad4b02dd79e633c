"""Messages, and what of an encoded conversation is trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles.data.types import Encoded


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def trained_runs(encoded: Encoded) -> list[tuple[int, int]]:
    """Return the first token of each run of trained tokens, and the one after it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask, [0]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def trained_text(tokenizer: Any, encoded: Encoded) -> list[str]:
    """Return the runs of trained tokens, decoded."""
    return [tokenizer.decode(encoded.input_ids[begin:end]) for begin, end in trained_runs(encoded)]
