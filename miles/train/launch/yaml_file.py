"""A YAML file of flags -> their values, with types kept and each mistake named by its line.

num_epoch: 3          --num-epoch 3
rollout-shuffle: true --rollout-shuffle
lr: 1e-5              a number here, as in YAML 1.2; in PyYAML's 1.1 it is text
num_epoch: off        an error: line 4: --num-epoch takes a whole number, not off
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from miles.common.flags import Setting
from miles.errors import ConfigError, SourceError
from miles.train.launch.launch_line import require_known
from miles.train.launch.values import from_yaml, kind_of


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and numbers such as 1e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z"),
    list("-+0123456789"),
)


def read_yaml(path: str, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the value of each flag that a file gives.

    Args:
        path: fsspec URL of the file: one mapping, names with `_` or `-`.
        settings: the flags that exist, by name.

    Raises:
        ConfigError: names the file, the line and the flag.
    """
    loader = _Loader(_text_of(path))
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"--config {path}: expected a mapping of flag names to values, such as lr: 1e-5"
            )
        loader.flatten_mapping(root)
        return _values_of(loader, root, path, settings)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML ({error})") from error
    finally:
        loader.dispose()


def _values_of(
    loader: _Loader, root: yaml.MappingNode, path: str, settings: Mapping[str, Setting]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, node in root.value:
        where = f"--config {path}, line {key.start_mark.line + 1}: "
        name = "--" + str(key.value).replace("_", "-")
        require_known(name, settings, where)
        if name in values:
            raise ConfigError(f"{where}{name} is given twice; leave out one of them")
        try:
            values[name] = _value_of(loader, node, settings[name])
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
    return values


def _value_of(loader: _Loader, node: yaml.Node, setting: Setting) -> Any:
    if setting.is_list and isinstance(node, yaml.SequenceNode):
        return [_item_of(loader, item, setting) for item in node.value]
    item = _item_of(loader, node, setting)
    return [item] if setting.is_list else item


def _item_of(loader: _Loader, node: yaml.Node, setting: Setting) -> Any:
    """Return the value of one node. A switch takes true and false, and not YAML's yes, on, off."""
    written = _written(node)
    value = loader.construct_object(node, deep=True)
    is_other_name = setting.is_switch and written.lower() not in ("true", "false")
    if value is None or is_other_name:
        raise ConfigError(f"{setting.flag.name} takes {kind_of(setting)}, not {written}")
    return from_yaml(setting, value, written)


def _written(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    text = str(node.value)
    return repr(text) if getattr(node, "style", None) else text or "nothing"


def _text_of(path: str) -> str:
    from miles.common import storage  # fsspec: a quarter of a second that most commands do not need

    try:
        with storage.reading(path):
            return storage.read_text(path)
    except SourceError as error:
        raise ConfigError(f"--config {error}") from error
