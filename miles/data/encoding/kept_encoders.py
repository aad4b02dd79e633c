"""The encoders of this process: each is made once.

encoder_of   kept here, else certified
state_of     the same as bytes, for other processes
rebuild      in another process: from those bytes
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from miles.data.config import EncodeConfig
from miles.data.encoding import carried_state
from miles.data.encoding.encoder import Encoder

_MAX_KEPT = 4


@dataclass
class _Kept:
    """An encoder, and what it is as bytes."""

    encoder: Encoder
    state: bytes | None
    """None: it cannot be carried, or it was carried here"""


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


def _certified(config: EncodeConfig) -> _Kept:
    key = _key_of(config)
    if key not in _kept:
        encoder = Encoder.from_config(config)
        _keep(key, _Kept(encoder, carried_state.pack(encoder)))
    return _kept[key]


def _keep(key: str, kept: _Kept) -> None:
    while len(_kept) >= _MAX_KEPT:
        _kept.pop(next(iter(_kept)), None)
    _kept[key] = kept


def _key_of(config: EncodeConfig) -> str:
    """Return the settings as JSON: they hold mappings, which have no hash."""
    return json.dumps(asdict(config), sort_keys=True)
