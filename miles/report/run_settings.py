"""The settings of a run as a table: `config.json` beside the defaults of this version.

--lr                          1e-05    default 1e-06    changed
--save                        /runs/a  must be given    given
cluster.object_store_bytes    …        its own name, for a setting without a flag
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles.common.flags import settings_of
from miles.train.config import TrainConfig

_MISSING = object()


@dataclass(frozen=True)
class SettingLine:
    """A setting of a run."""

    name: str
    """its flag, or its path in config.json"""
    help: str
    value: str
    default: str
    """as it is shown; "" where it has to be given, or is not known"""
    is_changed: bool
    """differs from the default, or has none"""


def setting_lines(config: Mapping[str, Any]) -> list[SettingLine]:
    """Return the settings of a run, those that differ from the defaults first.

    Args:
        config: the content of config.json.
    """
    lines = list(_lines(config, TrainConfig, "", _defaults_of(TrainConfig)))
    return sorted(lines, key=lambda line: (not line.is_changed, line.name.lstrip("-")))


def _lines(
    values: Mapping[str, Any], record: Any, path: str, defaults: Any
) -> Iterator[SettingLine]:
    """Yield the settings of a record and of those in it."""
    types = typing.get_type_hints(record) if record else {}
    flags: dict[str, Any] = {}
    for setting in settings_of(record) if record else ():
        flags.setdefault(setting.field, setting.flag)

    for key, value in values.items():
        default = defaults.get(key, _MISSING) if isinstance(defaults, dict) else _MISSING
        inner = types.get(key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(inner):
            found = _defaults_of(inner) if default is _MISSING else default
            yield from _lines(value, inner, f"{path}{key}.", found)
            continue

        flag = flags.get(key)
        yield SettingLine(
            name=flag.name if flag else f"{path}{key}",
            help=flag.help if flag else "",
            value=_shown(value),
            default="" if default is _MISSING else _shown(default),
            is_changed=default is _MISSING or value != default,
        )


def _defaults_of(record: Any) -> dict[str, Any]:
    """Return the defaults of a record's fields, as config.json would have them."""
    defaults = {}
    for field in dataclasses.fields(record):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        defaults[field.name] = json.loads(json.dumps(value, default=str))
    return defaults


def _shown(value: Any) -> str:
    """Return a value as a person writes it: a text without quotes, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
