"""The line of Miles's converter: the model's sizes as its model scripts give them, checked.

tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint DIR --save DIR
miles convert hf-to-megatron      ${MODEL_ARGS[@]} --hf-checkpoint DIR --save DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Collection

from miles.common.flags import Setting, settings_of
from miles.errors import ConfigError
from miles.train.compute_config import ComputeConfig
from miles.train.config import ClusterConfig
from miles.train.launch.fixed_flags import (
    BALANCED_BY,
    fixed_settings,
    replaced_settings,
    require_fixed,
)
from miles.train.launch.known_flags import require_known
from miles.train.launch.model_flags import require_sizes, size_settings
from miles.train.launch.parser import add_settings, given_values, launch_settings
from miles.train.optimizer_settings import OptimizerSettings

TITLE = "Flags of model scripts: what they say is compared with config.json, or changes no weight"

_LAYOUT = ("tensor", "pipeline", "expert", "expert_tensor", "sequence_parallel")
"""Fields of `ClusterConfig`: a checkpoint has no layout, and loads on any."""
_OF_THE_MODEL = (
    *("normalization", "position_embedding_type", "rotary_percent", "no_position_embedding"),
    *("attention_dropout", "hidden_dropout", "attention_softmax_in_fp32"),
    *("use_cpu_initialization", "use_mcore_models", "no_masked_softmax_fusion"),
)
"""Flags of `miles train` that say something of the model. Those of experts are told by `moe_`."""


def add_model_line(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model, and those that have no effect, to the converter's parser."""
    add_settings(parser.add_argument_group(TITLE), _settings())


def require_known_flag(known: Collection[str], flag: str) -> None:
    """Check that a flag is one of the converter's.

    Args:
        known: the converter's flags, those of the model among them.
        flag: as it is written.

    Raises:
        ConfigError: names the flag and what to do: it says nothing about a conversion, or is unknown.
    """
    if flag not in known and flag in launch_settings():
        raise ConfigError(f"{flag} says nothing about a conversion; leave it out")
    require_known(flag, known)


def require_model(flags: argparse.Namespace) -> None:
    """Check the model's sizes on a line, and the rows of its embedding, against config.json.

    Raises:
        ConfigError: names each that differs.
    """
    from miles.architecture.families import read_shape

    values = given_values(flags, _settings())
    require_fixed(values)
    shape = read_shape(flags.hf_checkpoint)
    require_sizes(flags.hf_checkpoint, shape, values)

    num_rows = flags.padded_vocab_size
    if num_rows is not None and num_rows < shape.vocab_size:
        raise ConfigError(
            f"--padded-vocab-size {num_rows} is less than the vocabulary of {shape.vocab_size} rows"
        )


def _settings() -> list[Setting]:
    """Return the settings that this line shares with launch lines.

    Those of `ComputeConfig` and the weight of the balancing loss are taken, since model scripts give
    some of them: they change no weight.
    """
    of_model = []
    for setting in (*fixed_settings(), *replaced_settings()):
        name = setting.flag.key_in_yaml
        if name in _OF_THE_MODEL or name.startswith("moe_"):
            of_model.append(setting)

    of_model += [one for one in settings_of(OptimizerSettings) if one.flag.name == BALANCED_BY]
    layout = [setting for setting in settings_of(ClusterConfig) if setting.field in _LAYOUT]
    return [*size_settings(), *of_model, *settings_of(ComputeConfig), *layout]
