"""The model's sizes on a launch line: config.json decides, and they must say the same.

Miles's model scripts give them, for each run and for each conversion. `--moe-layer-freq` is
Megatron-LM's: which layers have experts, as a number (every N-th one) or as a list:

    1                   all of them
    [0]*3+[1]*75        all but the first three
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from miles.architecture.config import ModelShape
from miles.common.flags import Flag, Setting, Values, flag_of
from miles.common.shown import cut
from miles.errors import ConfigError

SIZES_TITLE = "The model's sizes: config.json decides; where given they must say the same"

SIZES: Mapping[str, type] = {
    "num_layers": int,
    "hidden_size": int,
    "ffn_hidden_size": int,
    "num_attention_heads": int,
    "num_query_groups": int,
    "kv_channels": int,
    "vocab_size": int,
    "max_position_embeddings": int,
    "rotary_base": int,
    "rope_scaling_factor": float,
    "norm_epsilon": float,
    "num_experts": int,
    "moe_ffn_hidden_size": int,
    "moe_router_topk": int,
}
"""Flags of Miles's model scripts; they must say what config.json says."""

SWITCHES: tuple[str, ...] = (
    "swiglu",
    "group_query_attention",
    "use_rotary_position_embeddings",
    "use_rope_scaling",
    "qk_layernorm",
    "add_qkv_bias",
    "rotary_interleaved",
    "disable_bias_linear",
    "untie_embeddings_and_output_weights",
    "moe_router_pre_softmax",
)
"""Switches of Miles's model scripts; they must say what config.json says, too."""


EXPERT_LAYERS = "moe_layer_freq"
"""The flag for the layers that have experts."""
_TERM = re.compile(r"\[(?P<items>[01](?:,[01])*),?\](?:\*(?P<times>[0-9]{1,4}))?")
_EVERY = re.compile(r"[0-9]{1,9}")
_MAX_LAYERS = 10_000


def size_settings() -> list[Setting]:
    """Return the flags of `SIZES` and `SWITCHES` and the one for layers with experts."""
    settings = []
    for name, number in SIZES.items():
        settings.append(Setting(Flag(flag_of(name), "N", "as config.json says"), value_type=number))
    for name in SWITCHES:
        settings.append(Setting(Flag(flag_of(name), help="as config.json says"), value_type=bool))

    layers = Flag(
        flag_of(EXPERT_LAYERS),
        "LAYERS",
        "layers that have experts, as config.json says: every N-th, or a list such as [0]*3+[1]*75",
    )
    return [*settings, Setting(layers, value_type=str)]


def require_sizes(hf_checkpoint: str, shape: ModelShape, values: Values) -> None:
    """Check the sizes on a launch line against those of the model.

    Args:
        hf_checkpoint: the folder that the shape was read from.

    Raises:
        ConfigError: names each size that differs.
    """
    differences = differences_from(shape, values)
    if differences:
        raise ConfigError(
            f"the model's sizes are those of {hf_checkpoint}; the launch line says otherwise:\n  "
            + "\n  ".join(differences)
        )


def differences_from(shape: ModelShape, values: Values) -> list[str]:
    """Return a line for each size on a launch line that is not the model's."""
    model = shape.megatron_args()
    model["disable_bias_linear"] = not model["add_bias_linear"]
    differences = []
    for name in (*SIZES, *SWITCHES):
        value = values.get(flag_of(name))
        expected = model.get(name)
        if name == "rope_scaling_factor" and shape.rope_scaling_factor is None:
            if value not in (None, expected):  # Megatron-LM's default, unused without scaling
                differences.append(f"{flag_of(name)} {value}: config.json scales no positions")
            continue
        if value is not None and value != (bool(expected) if name in SWITCHES else expected):
            differences.append(f"{flag_of(name)} {value}: config.json says {expected}")

    written = values.get(flag_of(EXPERT_LAYERS))
    if written is not None:
        has_experts = shape.num_experts is not None
        if expert_layers(written, shape.num_layers) != [has_experts] * shape.num_layers:
            expected = f"[{int(has_experts)}]*{shape.num_layers}"
            differences.append(f"{flag_of(EXPERT_LAYERS)} {written}: config.json says {expected}")
    return differences


def expert_layers(written: str, num_layers: int) -> list[bool]:
    """Return which layers have experts, from the value of --moe-layer-freq.

    Raises:
        ConfigError: it is neither a number nor a list of Python's made of 0 and 1.
    """
    text = "".join(written.split())
    if _EVERY.fullmatch(text) and int(text):
        return [layer % int(text) == 0 for layer in range(num_layers)]

    layers: list[bool] = []
    for term in text.split("+"):
        match = _TERM.fullmatch(term)
        if match is None or len(layers) > _MAX_LAYERS:
            raise ConfigError(
                f"{flag_of(EXPERT_LAYERS)} {cut(written)}: a number or a list of 0 and 1 was expected, "
                "such as [0]*3+[1]*75"
            )
        items = [item == "1" for item in match["items"].split(",")]
        layers += items * int(match["times"] or 1)
    return layers
