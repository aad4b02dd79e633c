"""The parser of `miles train`, made from the settings that the records declare."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from miles.common.flags import (
    Flag,
    Setting,
    all_settings,
    records_of,
    require_setting_allowed,
    settings_of,
)
from miles.common.help_lines import explain
from miles.common.line_parser import LineParser
from miles.common.mistakes import Mistakes
from miles.errors import ConfigError, MilesError
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


SENTENCE = (
    "Fine-tune a model on rows, or go on with a run: the same line again resumes. Flags have Miles's "
    "names; docs/flags.md lists them all, and a file of --config may hold any of them. Start with "
    "--dry-run, which says all that can be known before."
)
EXAMPLES = (
    "train --hf-checkpoint models/qwen3 --prompt-data chat.jsonl --save runs/chat --dry-run",
    "train --hf-checkpoint models/qwen3 --prompt-data chat.jsonl --save runs/chat --num-epoch 2 "
    "--rollout-batch-size 64 --lr 1e-5",
    "train --config run.yaml --num-rollout 100",
)
"""Examples of `miles train --help`: lines that can be pasted, without `miles`."""


class LaunchParser(LineParser):
    """The parser of a launch line. `known_flags` says what is wrong with a flag that it lacks."""

    def unknown_words(self, words: Sequence[str], unknown: Sequence[str]) -> Sequence[MilesError]:
        """Return what is wrong with words that belong to no flag, unless an unknown flag does."""
        is_named = any(word.startswith("--") for word in unknown)
        return [] if is_named else super().unknown_words(words, unknown)


def build_parser(record: type = TrainConfig) -> LaunchParser:
    """Return the parser of a launch line.

    Args:
        record: the settings of a run.
    """
    parser = LaunchParser(
        prog="miles train",
        allow_abbrev=False,
        usage="%(prog)s [--config YAML] --hf-checkpoint DIR --prompt-data PATH --save DIR "
        "[flag ...]",
    )
    explain(parser, SENTENCE, *EXAMPLES)
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
        ConfigError: names each flag whose last value is not allowed.
    """
    parsed = vars(namespace)
    values = {}
    mistakes = Mistakes()
    for setting in settings:
        name = setting.flag.name
        if name not in parsed:
            continue

        value = parsed[name]
        if value is None:  # it could not be taken: that is a mistake already
            continue
        if value == []:  # argparse drops the `--` of `--lr=--`
            mistakes.add([ConfigError(f"{name}: a value was expected; found --")])
            continue
        mistakes.of(functools.partial(require_setting_allowed, setting, value))
        values[name] = value
    mistakes.raise_all()
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
