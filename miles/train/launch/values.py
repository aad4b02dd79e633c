"""A word of a command line, or a value of YAML -> a value of the type that its field wants.

--num-epoch 3     "3"    -> 3
num_epoch: off    False  -> an error: --num-epoch takes a whole number, not off
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from miles.common.flags import Setting, require_allowed
from miles.errors import ConfigError

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def from_word(setting: Setting, word: str) -> Any:
    """Return one word of a command line as a value; of a list, as one of its items.

    Raises:
        ConfigError: names the flag, what it takes, and the word.
    """
    if setting.is_mapping:
        return _json_object(setting, word)
    if setting.item_type in (str, Any):
        value: Any = word
    else:
        value = _convert(setting, word, repr(word), strict=False)
    require_allowed(setting.flag, value)
    return value


def from_yaml(setting: Setting, value: Any, written: str) -> Any:
    """Return a value of YAML as it is, where its type is the flag's; of a list, one of its items.

    Args:
        value: never None.
        written: how the file spells it, for the error.

    Raises:
        ConfigError: names the flag, what it takes, and what was written.
    """
    if setting.is_mapping:
        return _json_object(setting, value) if isinstance(value, str) else _mapping(setting, value)
    if setting.item_type is Any:
        return str(value)
    converted = _convert(setting, value, written, strict=True)
    require_allowed(setting.flag, converted)
    return converted


def kind_of(setting: Setting) -> str:
    """Say what a flag takes, for an error."""
    if setting.is_mapping:
        return "a mapping (JSON)"
    kind = _KINDS.get(setting.item_type, f"{setting.item_type}")
    return f"a list, each item {kind}" if setting.is_list else kind


def _convert(setting: Setting, value: Any, written: str, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, setting.item_type, strict=strict)
    except msgspec.ValidationError as error:
        hint = "; put it in quotes" if strict and setting.item_type is str else ""
        raise ConfigError(
            f"{setting.flag.name} takes {kind_of(setting)}, not {written}{hint}"
        ) from error


def _json_object(setting: Setting, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{setting.flag.name}: not JSON: {text}") from error
    return _mapping(setting, value)


def _mapping(setting: Setting, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{setting.flag.name}: a JSON object was expected, such as {{}}; found "
            f"{json.dumps(value, default=str)}"
        )
    return value
