"""The parser of `miles train`, made from the settings that the records declare."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from miles.common.flags import (
    Flag,
    Setting,
    all_settings,
    records_of,
    require_setting_allowed,
    settings_of,
)
from miles.common.help_lines import HelpLines
from miles.errors import ConfigError
from miles.train.config import TrainConfig
from miles.train.launch.fixed_flags import (
    FIXED_TITLE,
    REPLACED_TITLE,
    fixed_settings,
    replaced_settings,
)
from miles.train.launch.model_flags import SIZES_TITLE, size_settings
from miles.train.launch.values import from_word

CONFIG = Setting(Flag("--config", "YAML", "a file with flags: a mapping, names with _ or -"))


class LineParser(argparse.ArgumentParser):
    """A parser whose errors are ours. They quote no value, which may be a misplaced secret."""

    def error(self, message: str) -> NoReturn:
        message = re.sub("ignored explicit argument .*", "it takes no value", message)
        raise ConfigError(f"{message}; see {self.prog} --help")

    def _get_formatter(self) -> argparse.HelpFormatter:
        return HelpLines(self.prog)

    def parse_line(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse a whole line.

        Raises:
            ConfigError: a flag lacks its value, or a word belongs to no flag.
        """
        namespace, unknown = self.parse_known_args(list(words))
        if unknown:
            # The same word may stand elsewhere as a value, so the object counts.
            places = [place for place, word in enumerate(words) if word is unknown[0]]
            place = places[0] if places else words.index(unknown[0])
            flags = [word for word in words[:place] if word.startswith("--")]
            behind = f", behind {flags[-1].split('=')[0]}" if flags else ""
            self.error(f"word {place + 1} of the line{behind}, belongs to no flag")
        return namespace


def build_parser(record: type = TrainConfig) -> LineParser:
    """Return the parser of a launch line.

    Args:
        record: the settings of a run.
    """
    parser = LineParser(
        prog="miles train",
        allow_abbrev=False,
        usage="%(prog)s [--config YAML] --hf-checkpoint DIR --prompt-data PATH --save DIR "
        "[flag ...]",
        description="Fine-tune. Flags have Miles's names; docs/flags.md lists them all.",
    )
    add_launch_flags(parser, record)
    return parser


def add_launch_flags(parser: argparse.ArgumentParser, record: type = TrainConfig) -> None:
    """Add every flag that a launch line may have, in a group for each record."""
    add_setting(parser, CONFIG)
    for title, settings in launch_groups(record):
        group = parser.add_argument_group(title)
        for setting in settings:
            add_setting(group, setting)


def launch_groups(record: type = TrainConfig) -> list[tuple[str, list[Setting]]]:
    """Return the flags of a launch line by title: those of each record, then the others."""
    groups = []
    for inner in records_of(record):
        if settings := settings_of(inner):
            groups.append((title_of(inner), list(settings)))
    return [
        *groups,
        (FIXED_TITLE, fixed_settings()),
        (REPLACED_TITLE, replaced_settings()),
        (SIZES_TITLE, size_settings()),
    ]


def launch_settings(record: type = TrainConfig) -> dict[str, Setting]:
    """Return the flags of a launch line by name."""
    settings = [
        *all_settings(record),
        *fixed_settings(),
        *replaced_settings(),
        *size_settings(),
    ]
    return {setting.flag.name: setting for setting in settings}


def add_settings(parser: argparse._ActionsContainer, settings: Iterable[Setting]) -> None:
    """Add declared flags to the parser of a command other than `miles train`."""
    for setting in settings:
        add_setting(parser, setting, is_train=False)


def add_setting(
    parser: argparse._ActionsContainer, setting: Setting, *, is_train: bool = True
) -> None:
    """Add one flag. Its value stays away from the namespace where it is not given."""
    flag = setting.flag
    options: dict[str, Any] = {}
    if setting.is_switch:
        options["action"] = "store_true"
    else:
        options["metavar"] = flag.metavar
        options["type"] = functools.partial(from_word, setting)
        options["nargs"] = "+" if setting.is_list else None

    action = parser.add_argument(
        flag.name,
        dest=flag.name,
        default=argparse.SUPPRESS,
        help=_help_of(setting, is_train).replace("%", "%%"),
        **options,
    )
    # Not argparse's `choices`: those would be checked for values that a later one replaces, too.
    action.allowed = flag.choices  # type: ignore[attr-defined]


def given_values(namespace: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Any]:
    """Return the values of a parsed line's settings, by flag; those not given are absent.

    Raises:
        ConfigError: a flag's last value is not allowed.
    """
    parsed = vars(namespace)
    values = {}
    for setting in settings:
        name = setting.flag.name
        if name not in parsed:
            continue

        value = parsed[name]
        if value == []:  # argparse drops the `--` of `--lr=--`
            raise ConfigError(f"{name}: a value was expected; found --")
        require_setting_allowed(setting, value)
        values[name] = value
    return values


def title_of(record: type) -> str:
    """Return the title of a record's flags: the first sentence of its docstring."""
    return (record.__doc__ or record.__name__).split("\n")[0].split(". ")[0].rstrip(".")


def default_of(setting: Setting, *, is_train: bool = True) -> str:
    """Return what a missing value stands for, in words; empty where there is nothing to say.

    Args:
        is_train: for `miles train`, whose default may be another flag; elsewhere the field's own.
    """
    if setting.is_required:
        return "required"
    is_another_flag = setting.flag.default.startswith("--")
    if setting.flag.default and (is_train or not is_another_flag):
        return setting.flag.default
    if isinstance(setting.default, bool) or setting.default in (None, "", ()):
        return ""
    if setting.is_list:
        return " ".join(map(str, setting.default))
    return str(setting.default)


def _help_of(setting: Setting, is_train: bool) -> str:
    choices = f" [{' | '.join(setting.flag.choices)}]" if setting.flag.choices else ""
    default = default_of(setting, is_train=is_train)
    if default and not setting.is_required:
        default = f"default: {default}"
    return f"{setting.flag.help}{choices}" + (f" ({default})" if default else "")
