"""A setting is declared once, on the field that it fills; its flag follows from there.

    @dataclass(frozen=True)
    class OptimizerSettings:
        lr: Annotated[float, Flag("--lr", "RATE", "highest learning rate")] = 1e-5

The field gives the type and the default, `Flag` the rest. `settings_of` reads both, and command
lines, YAML, the check of allowed values, help texts, the table in docs and shell completion are
made from it. `build` makes the record from the values that were given.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from miles.common.local_paths import absolute
from miles.common.mistakes import Mistakes
from miles.common.near_names import did_you_mean, meant_path
from miles.common.secret import Secret
from miles.common.shown import shown
from miles.errors import ConfigError, SourceError

Record = TypeVar("Record")

FOLDERS = ("DIR",)
"""Metavars of flags that take a folder."""
FILES = ("FILE", "PATH", "YAML")
"""Metavars of flags that take a file, or a file, folder or pattern."""

Values = Mapping[str, Any]
"""Name of a flag (`--lr`) -> the value given for it, of its field's type; absent if not given."""


@dataclass(frozen=True)
class Flag:
    """The way to write one setting on a command line and in YAML."""

    name: str
    """with its dashes: `--lr`"""
    metavar: str = ""
    """the unit or kind of the value, in capitals; a switch has none"""
    help: str = ""
    choices: tuple[str, ...] = ()
    """the allowed values; empty: any"""
    minimum: int | None = None
    """the smallest allowed number"""
    above: int | None = None
    """a number that the value must exceed"""
    below: int | None = None
    """a number that must exceed the value"""
    choice: str = ""
    """what it chooses together with other fields, of which one at most may be given; a line's
    choice replaces a file's"""
    default: str = ""
    """meaning of a missing value, in words or as another flag, where the field's own default does
    not say it"""
    written_as: Any = None
    """the type of what is written, where the field's own is made from it"""
    is_file: bool = False
    """a path is written, and the field holds the file's text"""
    also: tuple[Flag, ...] = ()
    """further flags that fill the same field"""
    key: str = ""
    """for a flag in `also`: the entry of the field's mapping that it gives; empty: it is another
    name of the whole value"""
    negates: bool = False
    """for a switch in `also`: it says the opposite"""

    @property
    def is_path(self) -> bool:
        """Return whether it takes paths: a local one becomes absolute (`common.local_paths`)."""
        return self.metavar in (*FOLDERS, *FILES)

    @property
    def key_in_yaml(self) -> str:
        """`--max-tokens-per-gpu` -> `max_tokens_per_gpu`"""
        return self.name.removeprefix("--").replace("-", "_")


def flag_of(name: str) -> str:
    """Return the flag of a name: `max_tokens_per_gpu` -> `--max-tokens-per-gpu`."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Setting:
    """A flag together with what its field says."""

    flag: Flag
    field: str = ""
    value_type: Any = str
    """the type of what is written, without None"""
    default: Any = None
    is_required: bool = False

    @property
    def is_switch(self) -> bool:
        return self.value_type is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.value_type) is tuple

    @property
    def is_mapping(self) -> bool:
        return isinstance(typing.get_origin(self.value_type), type) and issubclass(
            typing.get_origin(self.value_type), Mapping
        )

    @property
    def is_secret(self) -> bool:
        """Return whether no message may quote the value."""
        return Secret in (self.value_type, *typing.get_args(self.value_type))

    @property
    def item_type(self) -> Any:
        """The type of one value; of a list, of each of its items."""
        return typing.get_args(self.value_type)[0] if self.is_list else self.value_type


def settings_of(record: type) -> tuple[Setting, ...]:
    """Return the settings that a record's own fields declare, in order."""
    return _settings_of(record)


@functools.cache
def _settings_of(record: type) -> tuple[Setting, ...]:
    settings = []
    declared = _declaration_of(record)
    for field in dataclasses.fields(record):
        flag, field_type = declared[field.name]
        if flag is None:
            continue

        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        default = field.default if field.default is not dataclasses.MISSING else None

        value_type = flag.written_as or field_type
        is_required = not has_default and not flag.default
        settings.append(Setting(flag, field.name, value_type, default, is_required))

        for further in flag.also:
            if further.key:
                settings.append(Setting(further, field.name, str))
                continue
            same_limits = dataclasses.replace(further, choices=flag.choices, minimum=flag.minimum)
            settings.append(Setting(same_limits, field.name, value_type))
    return tuple(settings)


def records_of(record: type) -> tuple[type, ...]:
    """Return the types of a record and of all records inside it, each once, in field order."""
    records = [record]
    for _, field_type in _declaration_of(record).values():
        inner_types = (field_type, *typing.get_args(field_type))
        for inner in inner_types:
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                records += records_of(inner)
    return tuple(dict.fromkeys(records))


def all_settings(record: type) -> tuple[Setting, ...]:
    """Return the settings of a record and of all records inside it."""
    settings: list[Setting] = []
    for inner in records_of(record):
        settings += settings_of(inner)
    return tuple(settings)


def names_of_same_values(record: type, given: Collection[str]) -> set[str]:
    """Return the flags that settle what a flag in `given` settles, too: one field, or one choice.

    `--bf16`, `--no-bf16` and `--fp16` are such names, whichever of them is given.
    """
    groups: dict[str, set[str]] = {}
    for setting in all_settings(record):
        flag = setting.flag
        others = {other.name for other in flag.also if not other.key}
        groups.setdefault(flag.choice or flag.name, set()).update({flag.name, *others})

    names = set()
    for together in groups.values():
        if len(together) > 1 and not together.isdisjoint(given):
            names |= together
    return names


def build(
    record: type[Record],
    values: Values,
    fixed: Mapping[str, Any] | None = None,
    mistakes: Mistakes | None = None,
    failed: Collection[str] = (),
) -> Record:
    """Make a record, and the records inside it, from the values of flags.

    Args:
        values: the flags that were given; a field whose flag is absent keeps its default.
        fixed: field -> its value, for fields that no flag fills alone.
        mistakes: that were found before, to be raised with those that are found here.
        failed: fields of which there is no value: why is among the mistakes.

    Raises:
        ConfigError: two flags of one field contradict one another, a file cannot be read, or the
            record refuses a value; names all of these.
    """
    mistakes = Mistakes() if mistakes is None else mistakes
    arguments = dict(fixed or {})
    for field in dict.fromkeys(setting.field for setting in settings_of(record)):
        if field not in arguments and field not in failed:
            value = mistakes.of(partial(_value_of_field, record, field, values))
            if value is not None:
                arguments[field] = value

    for name, (_, field_type) in _declaration_of(record).items():
        is_record = dataclasses.is_dataclass(field_type) and isinstance(field_type, type)
        if is_record and name not in arguments and name not in failed:
            inner = mistakes.of(partial(build, field_type, values))
            if inner is not None:
                arguments[name] = inner

    # The default of a part that cannot be made stands in for it, so that the others are checked.
    if mistakes.found and not failed and _lacks_nothing(record, arguments):
        mistakes.of(partial(record, **arguments))
    mistakes.raise_all()
    return record(**arguments)


def _lacks_nothing(record: type, arguments: Mapping[str, Any]) -> bool:
    """Return whether a record can be made of arguments: those without a default are there."""
    for field in dataclasses.fields(record):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.init and not has_default and field.name not in arguments:
            return False
    return True


def words_of(record: type, fields: Mapping[str, Any]) -> list[str]:
    """Return a record's fields as the words of a command line, without secrets and defaults.

    Args:
        fields: by name, as `dataclasses.asdict` gives them. A file's text stands for the path that
            it came from.
    """
    words = []
    for setting in settings_of(record):
        value = fields.get(setting.field)
        is_default = value == setting.default or value in (None, {}, [], ())
        is_other_switch = setting.is_switch and value is setting.flag.negates
        if is_default or is_other_switch or setting.flag.key or setting.is_secret:
            continue

        words.append(setting.flag.name)
        if setting.flag.is_file:
            words.append("FILE")
        elif not setting.is_switch:
            words += _written(value)
    return words


def check_settings(record: Any) -> None:
    """Check each field of a record against the allowed values of its flag.

    A field that holds a local path gets it as an absolute one: the other processes of a run have
    working directories of their own.

    Raises:
        ConfigError: names each such flag, the allowed values and what was found.
    """
    mistakes = Mistakes()
    checked: set[str] = set()
    for setting in settings_of(type(record)):
        value = getattr(record, setting.field)
        if value is not None and not setting.flag.key and setting.field not in checked:
            checked.add(setting.field)  # its other names say the same
            mistakes.of(partial(require_allowed, setting.flag, value))
            if setting.flag.is_path and isinstance(value, str) and not setting.flag.is_file:
                path = mistakes.of(partial(absolute_of, setting.flag, value))
                object.__setattr__(record, setting.field, path)
    mistakes.raise_all()


def absolute_of(flag: Flag, path: str) -> str:
    """Return the path that a flag gives as an absolute one.

    Raises:
        ConfigError: names the flag, and what cannot be in a path.
    """
    try:
        return absolute(path)
    except ConfigError as error:
        raise ConfigError(f"{flag.name} {error}") from None


def require(condition: bool, message: str) -> None:
    """Check a condition of a record's settings.

    Raises:
        ConfigError: it is not met; the message says which flag, what was found and what to do.
    """
    if not condition:
        raise ConfigError(message)


_LARGEST_NUMBER = 2**63 - 1
"""64 bits take no larger one."""


def require_allowed(flag: Flag, value: Any) -> None:
    """Check a value against its flag.

    Raises:
        ConfigError: it is none of the flag's choices, outside its bounds, or not finite.
    """
    if flag.choices and value not in flag.choices:
        raise ConfigError(
            f"{flag.name} must be one of {', '.join(flag.choices)}, not {shown(value)}"
            f"{did_you_mean(str(value), flag.choices)}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{flag.name} must be a finite number, not {value}")
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise ConfigError(f"{flag.name} must be at most {_LARGEST_NUMBER:,}, not {value:,}")

    if flag.above is not None and value <= flag.above:
        bound = "be positive" if flag.above == 0 else f"be above {flag.above}"
        raise ConfigError(f"{flag.name} must {bound}, not {value}")
    if flag.below is not None and value >= flag.below:
        raise ConfigError(f"{flag.name} must be below {flag.below}, not {value}")
    if flag.minimum is not None and value < flag.minimum:
        bound = {0: "not be negative", 1: "be positive"}.get(
            flag.minimum, f"be at least {flag.minimum}"
        )
        raise ConfigError(f"{flag.name} must {bound}, not {value}")


def require_setting_allowed(setting: Setting, value: Any) -> None:
    """Check a value, or each item of a list, against its flag.

    Raises:
        ConfigError: as `require_allowed` does; or a path is empty.
    """
    if setting.flag.is_path and value == "":
        raise ConfigError(
            f"{setting.flag.name} is empty, such as a variable that is not set; give a path, or "
            "leave the flag out"
        )
    for item in value if setting.is_list else [value]:
        require_allowed(setting.flag, item)


def _value_of_field(record: type, field: str, values: Values) -> Any:
    """Return the value that the field's flags give together; None where none is given."""
    flag = next(setting.flag for setting in settings_of(record) if setting.field == field)
    value = values.get(flag.name)
    for further in flag.also:
        given = values.get(further.name)
        if given is not None:
            value = _combined(flag, value, further, given)

    if flag.is_file and value is not None:
        return _text_of(flag, value)
    return tuple(value) if isinstance(value, list) else value


def _combined(flag: Flag, value: Any, further: Flag, given: Any) -> Any:
    """Return a field's value together with what another of its flags gives."""
    if further.key:
        return _with_entry(flag, value, further, given)
    if further.negates:
        return _with_opposite(flag, value, further, given)
    return _with_same(flag, value, further, given)


def _with_entry(flag: Flag, value: Any, further: Flag, entry: Any) -> dict[str, Any]:
    """Return a mapping together with the entry that another flag gives."""
    mapping = dict(value or {})
    if mapping.setdefault(further.key, entry) != entry:
        raise ConfigError(
            f"{further.name} {entry}: {flag.name} says {further.key} is {mapping[further.key]!r}; "
            "give one of them"
        )
    return mapping


def _with_same(flag: Flag, value: Any, further: Flag, given: Any) -> Any:
    """Return a value that another flag gives as well."""
    if value is not None and value != given:
        raise ConfigError(
            f"{flag.name} {value} and {further.name} {given} must be equal: they are two names of "
            "one value"
        )
    return given


def _with_opposite(flag: Flag, value: bool | None, further: Flag, given: bool) -> bool:
    """Return the value of a switch that a switch of the opposite meaning gives as well."""
    if value is not None and value == given:
        raise ConfigError(f"{flag.name} and {further.name} contradict one another; give one")
    return not given


def _written(value: Any) -> list[str]:
    """Return a flag's value as words."""
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    items = value if isinstance(value, list | tuple) else [value]
    return [str(item) for item in items]


def _text_of(flag: Flag, path: str) -> str:
    from miles.common import storage  # fsspec: a quarter of a second that most commands do not need

    try:
        with storage.reading(path):
            return storage.read_text(path)
    except SourceError as error:
        raise ConfigError(f"{flag.name} {error}{meant_path(path)}") from error


def _declaration_of(record: type) -> Mapping[str, tuple[Flag | None, Any]]:
    """Return each field's flag, if it has one, and its type without None."""
    hints = typing.get_type_hints(record, include_extras=True)
    return {field.name: _split(hints[field.name]) for field in dataclasses.fields(record)}


def _split(hint: Any) -> tuple[Flag | None, Any]:
    """Split a type hint: `Annotated[int | None, Flag(...)]` -> the flag, `int`."""
    flag = None
    if typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        flag = next((extra for extra in extras if isinstance(extra, Flag)), None)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return flag, hint
