"""A YAML file of flags -> their values, with types kept and each mistake named by its line.

num_epoch: 3          --num-epoch 3
rollout-shuffle: true --rollout-shuffle
lr: 1e-5              a number here, as in YAML 1.2; in PyYAML's 1.1 it is text
num_epoch: off        an error: line 4: --num-epoch takes a whole number, not off
no_rope_fusion: false an error: it negates twice
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import yaml

from miles.common.flags import Setting, require_setting_allowed
from miles.common.mistakes import Mistakes
from miles.common.near_names import meant_path
from miles.errors import ConfigError, SourceError
from miles.train.launch.fixed_flags import require_fixed
from miles.train.launch.known_flags import require_known
from miles.train.launch.values import from_yaml, takes_another


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and numbers such as 1e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


_NAME_IN_PROBLEM = re.compile(r"""\b(alias|anchor|tag handle|tag) (['"]).*?\2""")
"""The name of an alias, an anchor or a tag, as PyYAML's errors quote it."""

_CONSTRUCTOR_ERRORS = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""The errors of PyYAML for a value that is not of its tag, such as `2024-13-45` or `!!bool a`."""


def read_yaml(
    path: str, settings: Mapping[str, Setting], replaced: Collection[str] = ()
) -> dict[str, Any]:
    """Return the value of each flag that a file gives.

    Args:
        path: fsspec URL of the file: one mapping, names with `_` or `-`.
        settings: the flags that exist, by name.
        replaced: flags that the line gives, too; any value of their type does for these.

    Raises:
        ConfigError: names the file, and the line and the flag of each mistake.
    """
    text = _text_of(path)
    try:
        return _values_of(_Loader(text), path, settings, replaced)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # none: a character that YAML does not allow
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--config {path}{line}: {_problem_of(error)}") from None
    except RecursionError as error:
        raise ConfigError(f"--config {path}: not YAML (nested too deeply)") from error


def _values_of(
    loader: _Loader, path: str, settings: Mapping[str, Setting], replaced: Collection[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    mistakes = Mistakes()
    for name, (where, node) in _nodes_of(loader, path, settings, mistakes).items():
        try:
            values[name] = _value_of(loader, node, settings[name])
            if name not in replaced:
                _require_one_negation(settings[name], values[name])
                require_fixed({name: values[name]})
                require_setting_allowed(settings[name], values[name])
        except ConfigError as error:
            mistakes.add([ConfigError(f"{where}{error}")])
    mistakes.raise_all()
    return values


def _require_one_negation(setting: Setting, value: Any) -> None:
    """Refuse `no_x: false`, which some read as x, and others as no x.

    Raises:
        ConfigError: says what to write.
    """
    if setting.flag.negates and value is False:
        positive = setting.flag.name.replace("--no-", "", 1).replace("-", "_")
        raise ConfigError(
            f"{setting.flag.name}: false negates twice; write {positive}: true, or leave it out"
        )


def _nodes_of(
    loader: _Loader, path: str, settings: Mapping[str, Setting], mistakes: Mistakes
) -> dict[str, tuple[str, yaml.Node]]:
    """Return flag -> where it stands, and its node. A name replaces one that `<<` merges.

    Args:
        mistakes: gets the names that are no flags, or are there twice.
    """
    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"--config {path}: expected a mapping of flag names to values, such as lr: 1e-5"
        )
    own_keys = {id(key) for key, _ in root.value}
    loader.flatten_mapping(root)  # merged entries stand before the mapping's own

    nodes: dict[str, tuple[str, yaml.Node]] = {}
    own_names = set()
    for key, node in root.value:
        where = f"--config {path}, line {key.start_mark.line + 1}: "
        if not isinstance(key, yaml.ScalarNode):
            text = f"{where}the name of a flag was expected, not {_written(key)}"
            mistakes.add([ConfigError(text)])
            continue
        name = "--" + key.value.replace("_", "-")
        mistakes.of(partial(require_known, name, settings, where))
        if name not in settings:
            continue

        is_first = name not in own_names
        mistakes.require(is_first, f"{where}{name} is given twice; leave out one of them")
        if id(key) in own_keys:
            own_names.add(name)
        nodes[name] = (where, node)
    return nodes


def _value_of(loader: _Loader, node: yaml.Node, setting: Setting) -> Any:
    if setting.is_list and isinstance(node, yaml.SequenceNode):
        return [_item_of(loader, item, setting) for item in node.value]
    item = _item_of(loader, node, setting)
    return [item] if setting.is_list else item


def _item_of(loader: _Loader, node: yaml.Node, setting: Setting) -> Any:
    """Return the value of one node. A switch takes true and false, and not YAML's yes, on, off."""
    written = _written(node)
    try:
        value = loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"{setting.flag.name}: {_problem_of(error)}") from None
    except _CONSTRUCTOR_ERRORS as error:
        raise takes_another(setting, written) from error
    is_other_name = setting.is_switch and written.lower() not in ("true", "false")
    if value is None or is_other_name:
        raise takes_another(setting, written)
    return from_yaml(setting, value, written)


def _written(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    text = str(node.value)
    return repr(text) if getattr(node, "style", None) else text or "nothing"


def _problem_of(error: yaml.YAMLError) -> str:
    """Return what is wrong, on one line, without the names in it: `key: *SECRET` is a slip."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        text = ", ".join(part for part in (error.context, error.problem) if part)
    unnamed = _NAME_IN_PROBLEM.sub(r"\1", " ".join(text.split()))
    return f"not YAML ({unnamed})"


def _text_of(path: str) -> str:
    from miles.common import storage  # fsspec: a quarter of a second that most commands do not need

    try:
        with storage.reading(path):
            return storage.read_text(path)
    except SourceError as error:
        raise ConfigError(f"--config {error}{meant_path(path)}") from error
