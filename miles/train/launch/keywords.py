"""The flags of a run as Python's keywords -> its settings, as a launch line would give them.

rollout_batch_size=32                  --rollout-batch-size 32
prompt_data={"chat": "chat.jsonl"}     --prompt-data chat chat.jsonl
prompt_data=ds                         the rows of a prepared set, and its encoding
rollout_shuffle=True                   --rollout-shuffle
config="run.yaml"                      --config run.yaml
save_hf=None                           as if it were not given

Errors and notices name flags; `in_keywords` has them name keywords.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

from miles.common.flags import (
    Setting,
    Values,
    flag_of,
    require_setting_allowed,
    settings_of,
)
from miles.common.mistakes import Mistakes
from miles.common.python_words import Arguments, in_python
from miles.common.shown import shown
from miles.data.config import DataConfig, EncodeConfig, RowFormat, SourceConfig
from miles.errors import ConfigError
from miles.train.config import TrainConfig
from miles.train.launch.arguments import LaunchLine, complete, with_file
from miles.train.launch.fixed_flags import require_fixed
from miles.train.launch.known_flags import require_known
from miles.train.launch.parser import launch_settings
from miles.train.launch.values import from_yaml, takes_another

_ROWS = "--prompt-data"
_TRANSFORM = "--transform"
_ARGUMENTS = Arguments(launch_settings, switches=frozenset(("--trust-remote-code",)))


@runtime_checkable
class PreparedSet(Protocol):
    """The result of `miles.data.prepare`, as far as a run looks at it."""

    @property
    def settings(self) -> DataConfig:
        """Its rows and their encoding."""


def read_keywords(
    keywords: Mapping[str, Any], config_file: str | None = None, record: type = TrainConfig
) -> LaunchLine:
    """Return the run that keywords ask for, and what is to be said about them.

    Args:
        keywords: name of a flag, with `_` for `-`, -> its value; None: as if it were not given.
        config_file: a YAML file of flags; keywords win.
        record: the settings of a run.

    Raises:
        ConfigError: names each such flag, what was found, what was expected and what to do.
    """
    settings = launch_settings(record)
    mistakes = Mistakes()
    prepared: DataConfig | None = None
    values: dict[str, Any] = {}
    for keyword, value in keywords.items():
        flag = flag_of(keyword)
        mistakes.of(partial(require_known, flag, settings))
        if value is None or flag not in settings:
            continue
        if flag == _ROWS and isinstance(value, PreparedSet):
            prepared = value.settings
            continue
        values[flag] = mistakes.of(partial(_checked_value, settings[flag], value))

    values = mistakes.of(partial(with_file, values, config_file, record)) or {}
    mistakes.raise_all()
    if prepared is not None:
        values.pop(_ROWS, None)
        _require_no_row_settings(values)
    return complete(values, record, prepared=prepared)


def in_keywords(text: str) -> str:
    """Return a text of ours in which keywords of `miles.train.run` stand for flags."""
    return in_python(text, _ARGUMENTS)


def _checked_value(setting: Setting, value: Any) -> Any:
    """Return a value as the type that its flag takes, and one that it may have."""
    taken = _value_of(setting, value)
    require_fixed({setting.flag.name: taken})
    require_setting_allowed(setting, taken)
    return taken


def _value_of(setting: Setting, value: Any) -> Any:
    """Return a value as the type that its flag takes.

    Raises:
        ConfigError: it is of another type.
    """
    if setting.flag.negates and value is False:
        positive = setting.flag.name.replace("--no-", "--", 1)
        raise ConfigError(
            f"{setting.flag.name}=False negates twice; write {positive}=True, or leave it out"
        )
    if not setting.is_list:
        return _item_of(setting, value)
    is_rows = setting.flag.name in (_ROWS, "--eval-prompt-data")
    if is_rows and isinstance(value, Mapping):
        value = [word for pair in value.items() for word in pair]
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if is_rows:
        _require_paths(setting.flag.name, value if is_list else [value])
    return [_item_of(setting, item) for item in value] if is_list else [_item_of(setting, value)]


def _require_paths(flag: str, words: Sequence[Any]) -> None:
    """Refuse rows that stand where paths of rows belong.

    Raises:
        ConfigError: says where they belong.
    """
    for word in words:
        if word is not None and not isinstance(word, str | os.PathLike):
            also = f", or one data set of miles.data.prepare as {flag}" if flag == _ROWS else ""
            raise ConfigError(
                f"{flag} takes a path, a list of names and paths, or a mapping from names to paths"
                f"{also}, not {shown(word)} ({type(word).__name__}). Rows themselves are given to "
                "miles.data.prepare"
            )


def _item_of(setting: Setting, value: Any) -> Any:
    plain = _plain(value)
    if setting.flag.name == _TRANSFORM and callable(value):
        raise ConfigError(
            f"{_TRANSFORM} takes the name of a function, package.module:function; a function itself "
            "is given to miles.data.prepare, whose data set is then the rows of the run"
        )
    if plain is None:
        raise takes_another(setting, "None")
    return from_yaml(setting, plain, shown(value))


def _plain(value: Any) -> Any:
    """Return a path as its text and a number of numpy as Python's; any other value as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | str | Mapping):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return value


def _require_no_row_settings(values: Values) -> None:
    """Refuse settings that a prepared set has settled: what was looked at is what is trained.

    Raises:
        ConfigError: names the setting, and says where it belongs.
    """
    for record in (RowFormat, EncodeConfig, SourceConfig):
        for setting in settings_of(record):
            flag = setting.flag.name
            if flag in values:
                raise ConfigError(
                    f"{flag}: {_ROWS} is a prepared data set, which has settled how its rows are "
                    f"read and encoded; give it to miles.data.prepare, or give {_ROWS} as paths"
                )
