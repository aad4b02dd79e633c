"""A word of a command line, or a value of YAML -> a value of the type that its field wants.

--num-epoch 3     "3"    -> 3
num_epoch: off    False  -> an error: --num-epoch takes a whole number, not off
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from miles.common.flags import Setting
from miles.common.secret import SHOWN, Secret
from miles.common.shown import cut
from miles.errors import ConfigError
from miles.train.launch.fixed_flags import values_of_fixed

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Secret: "text",
    bool: "true or false",
}
_JSON_EXPECTED = 'a JSON object was expected, such as {"prompt": "question"}'


def from_word(setting: Setting, word: str) -> Any:
    """Return one word of a command line as a value; of a list, as one of its items.

    Numbers are what Python's `int` and `float` take, so `.1` and `1_000`, too. An empty word is the
    empty mapping.

    Raises:
        ConfigError: names the flag, what it takes, and the word.
    """
    if setting.is_mapping:
        return _json_object(setting, word) if word else {}
    if setting.item_type in (str, Any):
        return word
    if setting.item_type is Secret:
        return Secret(word)
    if setting.item_type in (int, float):
        try:
            return setting.item_type(word)
        except ValueError as error:
            raise takes_another(setting, repr(word)) from error
    return _convert(setting, word, repr(word), strict=False)


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
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise takes_another(setting, written)
        return str(value)
    if setting.item_type is Secret:
        if not isinstance(value, str):
            raise takes_another(setting, written, "; put it in quotes")
        return Secret(value)
    return _convert(setting, value, written, strict=True)


def takes_another(setting: Setting, written: str, hint: str = "") -> ConfigError:
    """Return the error for a value that is none of those that a flag takes.

    Args:
        written: the value as the user spelled it; not shown where it is a secret.
        hint: what to do, behind the message.
    """
    found = SHOWN if setting.is_secret else cut(written)
    return ConfigError(f"{setting.flag.name} takes {_kind_of(setting)}, not {found}{hint}")


def _kind_of(setting: Setting) -> str:
    if setting.is_mapping:
        return "a mapping (JSON)"
    if setting.item_type is Any:
        return " or ".join(values_of_fixed(setting.flag.name))
    if setting.flag.choices:
        return f"one of {', '.join(setting.flag.choices)}"
    kind = _KINDS.get(setting.item_type, f"{setting.item_type}")
    return f"a list, each item {kind}" if setting.is_list else kind


def _convert(setting: Setting, value: Any, written: str, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, setting.item_type, strict=strict)
    except msgspec.ValidationError as error:
        is_any_text = setting.item_type is str and not setting.flag.choices
        would_be_text = is_any_text and not isinstance(value, list | dict)
        raise takes_another(
            setting, written, "; put it in quotes" if would_be_text else ""
        ) from error


def _json_object(setting: Setting, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = SHOWN if setting.is_secret else cut(text)
        # JSONDecodeError keeps the text, and a debugger would show it.
        cause = None if setting.is_secret else error
        raise ConfigError(f"{setting.flag.name}: not JSON: {found}; {_JSON_EXPECTED}") from cause
    return _mapping(setting, value)


def _mapping(setting: Setting, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = SHOWN if setting.is_secret else cut(json.dumps(value, default=str))
        raise ConfigError(f"{setting.flag.name}: {_JSON_EXPECTED}; found {found}")
    return _secrets(setting, value) if setting.is_secret else value


def _secrets(setting: Setting, mapping: dict[str, Any]) -> dict[str, Secret]:
    """Return a mapping of names to texts with its texts hidden."""
    secrets = {}
    for name, text in mapping.items():
        if not isinstance(text, str):
            shown = name.split("=")[0]  # behind it may be a secret
            raise ConfigError(
                f"{setting.flag.name}: the value of {shown} must be text, in quotes; found another "
                "type"
            )
        secrets[name] = Secret(text)
    return secrets
