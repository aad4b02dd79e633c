"""Encoders of earlier starts: the next one of the same tokenizer and settings certifies nothing.

    key    hash of the tokenizer's files, every setting, and the versions of all that is involved
    file   `carried_state`'s bytes, in the user's cache (`common/cache_files.py`)

A tokenizer that is named by the hub's name is not kept: which files that means is for the hub to
say. Nor is one that may bring code of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from miles.common import cache_files
from miles.data.config import EncodeConfig
from miles.data.encoding import carried_state
from miles.data.encoding.encoder import Encoder
from miles.data.tokens.load import content_hash

_KIND = "encoders"
_MAX_FILES = 8
"""Of Qwen3's tokenizer, each has 7.5 MB."""


def key_of(config: EncodeConfig) -> str | None:
    """Return the name under which an encoder is kept; None where none is.

    Raises:
        TemplateError: there is no tokenizer, or its files are refused.
    """
    if config.trust_remote_code or cache_files.folder() is None:
        return None
    files = content_hash(config)
    if files is None:
        return None
    involved = [files, asdict(config), dict(carried_state.versions())]
    return hashlib.sha256(json.dumps(involved, sort_keys=True).encode()).hexdigest()


def find(key: str, config: EncodeConfig) -> tuple[Encoder, bytes] | None:
    """Return the encoder that is kept under a key, and its state."""
    state = cache_files.read(_KIND, key)
    if state is None:
        return None
    try:
        encoder = carried_state.unpack(state, config)
    except Exception:  # whatever numpy makes of bytes that an older version wrote under this hash
        return None
    return None if encoder is None else (encoder, state)


def keep(key: str, state: bytes) -> None:
    """Keep an encoder, as far as the cache can be written."""
    cache_files.write(_KIND, key, state, _MAX_FILES)
