"""Encoders of earlier starts: the next one of the same tokenizer and settings certifies nothing.

    key    hash of the tokenizer's files, every setting, and the versions of all that is involved
    file   `carried_state`'s bytes, in the user's cache (`common/cache_files.py`)

Of a name of the hub, the files are those of the hub's cache, which are loaded first. A tokenizer
that may bring code of its own is not kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from miles.common import cache_files
from miles.data.config import EncodeConfig
from miles.data.encoding import carried_state
from miles.data.encoding.encoder import Encoder
from miles.data.tokens.load import content_hash, load_with_content

KIND = "encoders"
_MAX_FILES = 8
"""The state of Qwen3's tokenizer has 7.5 MB."""


def key_of(config: EncodeConfig) -> str | None:
    """Return the name under which an encoder is kept; None where none is.

    Raises:
        TemplateError: there is no tokenizer, or its files are refused.
    """
    if config.trust_remote_code or cache_files.folder() is None:
        return None
    content = content_hash(config)
    return None if content is None else _key_of(content, config)


def _key_of(content: str, config: EncodeConfig) -> str:
    involved = [content, asdict(config), dict(carried_state.versions())]
    return hashlib.sha256(json.dumps(involved, sort_keys=True).encode()).hexdigest()


def find(key: str, config: EncodeConfig) -> tuple[Encoder, bytes] | None:
    """Return the encoder that is kept under a key, and its state."""
    state = cache_files.read(KIND, key)
    if state is None:
        return None
    try:
        encoder = carried_state.unpack(state, config)
    except Exception:  # whatever numpy makes of bytes that an older version wrote under this hash
        return None
    return None if encoder is None else (encoder, state)


def keep_derived(key: str, state: bytes, first: EncodeConfig, config: EncodeConfig) -> None:
    """Keep what was made of a state that the cache has, of the same files.

    Args:
        key: of the derived state.
        first: the settings of the other one.
        config: the settings of the derived one.
    """
    content = content_hash(config)
    if content is None or _key_of(content, config) != key:
        return
    if cache_files.read(KIND, _key_of(content, first)) is not None:
        cache_files.write(KIND, key, state, _MAX_FILES)


def keep(key: str, config: EncodeConfig, state: bytes) -> None:
    """Keep the encoder that this process has certified, as far as the cache can be written.

    It is not kept where the tokenizer was made of other files than the key says: they changed while
    they were loaded, or after this process had loaded them.
    """
    _, content = load_with_content(config)
    if content is not None and _key_of(content, config) == key:
        cache_files.write(KIND, key, state, _MAX_FILES)
