"""The encoders of this process: each is made once.

encoder_of   kept here, else certified
first_engine settings under which few rows are encoded soonest
state_of     the same as bytes, for other processes
rebuild      in another process: from those bytes
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from miles.data.config import EncodeConfig
from miles.data.encoding import carried_state, state_cache
from miles.data.encoding.encoder import Encoder
from miles.data.tokens.bpe import AUTO, faster_where_proven, text_encoder_of
from miles.data.tokens.engines import TIKTOKEN
from miles.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from miles.data.tokens.carried_tokenizer import CarriedTokenizer

_MAX_KEPT = 4
_REPAID_ROWS = 50_000
"""Rows of a loader, of 1,000 characters, that repay proving fastokens once and making it there."""


@dataclass
class _Kept:
    """An encoder, and what it is as bytes."""

    encoder: Encoder
    state: bytes | None
    """None: it cannot be carried, or was carried here"""


_kept: dict[str, _Kept] = {}
"""settings -> the encoder; the oldest make room"""


def encoder_of(config: EncodeConfig) -> Encoder:
    """Return the encoder of these settings.

    Raises:
        TemplateError: as `Encoder.from_config`.
    """
    return _certified(config).encoder


def state_of(config: EncodeConfig) -> bytes | None:
    """Return the encoder of these settings as bytes; None where it cannot be carried.

    Raises:
        TemplateError: as `Encoder.from_config`.
    """
    return _certified(config).state


def rebuild(config: EncodeConfig, fetch: Callable[[], bytes | memoryview]) -> None:
    """Make the encoder of these settings from its state, unless this process has it.

    A state of other versions is passed over: `encoder_of` will certify anew.

    Args:
        fetch: returns what `state_of` returned in another process.
    """
    key = _key_of(config)
    if key in _kept:
        return
    encoder = carried_state.unpack(fetch(), config)
    if encoder is not None:
        _keep(key, _Kept(encoder, None))


def first_engine(config: EncodeConfig) -> EncodeConfig:
    """Certify a tokenizer; return the settings under which few rows are encoded soonest.

    To prove fastokens takes three seconds, which few rows do not repay. So these are the settings
    as they are where their encoder is known, or the choice of the engine is not free, or tiktoken
    is not proven either; else with tiktoken. What was certified serves `encoder_of` later on.

    Raises:
        TemplateError: as `Encoder.from_config`.
    """
    if config.tokenizer_engine != AUTO or known(config) is not None:
        encoder_of(config)
        return config
    first = _with_tiktoken(config)
    try:
        encoder_of(first)
    except ConfigError:  # tiktoken is not proven
        encoder_of(config)
        return config
    return first


def repay_fastokens(num_rows: int, num_loaders: int) -> bool:
    """Return whether to make fastokens in each loader costs less than to go on without it.

    Args:
        num_rows: that the loaders encode together.
    """
    return num_rows >= _REPAID_ROWS * num_loaders


def make_engine(config: EncodeConfig) -> None:
    """Make the engine of these settings at once, in a process that will encode much."""
    text_encoder_of(encoder_of(config).tokenizer, config.tokenizer_engine).make_engine()


def known(config: EncodeConfig) -> Encoder | None:
    """Return the encoder of these settings where nothing has to be loaded or certified for it.

    Raises:
        TemplateError: there is no tokenizer, or its files are refused.
    """
    key = _key_of(config)
    if key not in _kept and (found := _of_earlier_start(state_cache.key_of(config), config)):
        _keep(key, found)
    return _kept[key].encoder if key in _kept else None


def known_tokenizer(config: EncodeConfig) -> PreTrainedTokenizerBase | CarriedTokenizer | None:
    """Return the tokenizer of these settings where nothing has to be loaded or certified for it.

    What `first_engine` certified serves, too: the tokens are the same.

    Raises:
        TemplateError: there is no tokenizer, or its files are refused.
    """
    found = known(config)
    if found is None and config.tokenizer_engine == AUTO:
        found = known(_with_tiktoken(config))
    return None if found is None else found.tokenizer


def _certified(config: EncodeConfig) -> _Kept:
    key = _key_of(config)
    if key not in _kept:
        cached = state_cache.key_of(config)
        found = _of_earlier_start(cached, config) or _of_first_engine(cached, config)
        _keep(key, found or _of_this_start(cached, config))
    return _kept[key]


def _of_earlier_start(cached: str | None, config: EncodeConfig) -> _Kept | None:
    found = None if cached is None else state_cache.find(cached, config)
    return None if found is None else _Kept(*found)


def _of_first_engine(cached: str | None, config: EncodeConfig) -> _Kept | None:
    """Prove the faster engine for what `first_engine` certified, here or at an earlier start."""
    if config.tokenizer_engine != AUTO:
        return None
    first = _with_tiktoken(config)
    found = _kept.get(_key_of(first))
    if found is None and cached is not None:
        found = _of_earlier_start(state_cache.key_of(first), first)
    if found is None or found.state is None:
        return None

    engine = faster_where_proven(text_encoder_of(found.encoder.tokenizer, TIKTOKEN))
    state = carried_state.with_engine(found.state, engine, config)
    encoder = carried_state.unpack(state, config)
    if encoder is None:
        return None
    if cached is not None:
        state_cache.keep_derived(cached, state, first, config)
    return _Kept(encoder, state)


def _with_tiktoken(config: EncodeConfig) -> EncodeConfig:
    return replace(config, tokenizer_engine=TIKTOKEN)


def _of_this_start(cached: str | None, config: EncodeConfig) -> _Kept:
    """Certify an encoder, and keep it in the cache.

    Args:
        cached: its key there; None: it is not kept.
    """
    encoder = Encoder.from_config(config)
    state = carried_state.pack(encoder)
    if state is not None and cached is not None:
        state_cache.keep(cached, config, state)
    return _Kept(encoder, state)


def _keep(key: str, kept: _Kept) -> None:
    while len(_kept) >= _MAX_KEPT:
        _kept.pop(next(iter(_kept)), None)
    _kept[key] = kept


def _key_of(config: EncodeConfig) -> str:
    """Return the settings as JSON: they hold mappings, which have no hash."""
    return json.dumps(asdict(config), sort_keys=True)
