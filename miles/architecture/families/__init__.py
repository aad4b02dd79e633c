"""One file a model family: the meaning of its `config.json`, and its parameter map.

The files are looked up here, by the name of the family:

    config.json   ->   model_type "qwen3"   ->   families/qwen3.py   ->   ModelShape, parameter map

A family's file is named like its `model_type` and declares `ARCHITECTURE`, `shape`, `parameters`
and `extra_states` (docs/adding-a-model.md). No other file names it: it is found by its name.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Container, Mapping, Sequence
from typing import Any, Protocol, cast

from miles.architecture.config import HfConfig, ModelShape
from miles.architecture.parameters import ExtraState, Parameter
from miles.common import storage
from miles.common.near_names import meant_path
from miles.common.shown import shown
from miles.common.untrusted_files import read_json
from miles.errors import CheckpointError, MissingFileError, SourceError

TIED_COPY = "lm_head.weight"
"""Some checkpoints store the output layer although it is the embedding, or store it in its place;
Megatron's never do."""
TIED_TO = "model.embed_tokens.weight"


class Family(Protocol):
    """The names that the file of a family declares."""

    ARCHITECTURE: str
    """the one entry of `architectures` in config.json"""

    def shape(self, config: HfConfig) -> ModelShape: ...

    def parameters(self, shape: ModelShape) -> tuple[Parameter, ...]: ...

    def extra_states(self, shape: ModelShape) -> tuple[ExtraState, ...]: ...


def model_types() -> list[str]:
    """Return the `model_type`s that are understood."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(name for name in names if not name.startswith("_"))


def family_of(model_type: str) -> Family:
    """Return the module of a family, which is one of `model_types()`."""
    return cast(Family, importlib.import_module(f"{__name__}.{model_type}"))


def read_shape(url: str) -> ModelShape:
    """Read `config.json` in the folder of a Hugging Face checkpoint (fsspec URL).

    Raises:
        CheckpointError: it is missing, is not JSON, or is of an unknown architecture.
    """
    where = storage.join(url, "config.json")
    try:
        config = read_json(where, CheckpointError)
    except MissingFileError as error:
        raise CheckpointError(
            f"{error}; expected a Hugging Face checkpoint's folder (for one of the hub: "
            f"hf://ORG/NAME){meant_path(url)}"
        ) from error
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    return shape_of(config, where)


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape that the content of a `config.json` describes.

    Args:
        config: the parsed JSON.
        where: names the file in errors.

    Raises:
        CheckpointError: an architecture or a setting that is not understood.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where}: a JSON object was expected; found {type(config).__name__}")
    model_type = config.get("model_type")
    known = model_types()
    if model_type not in known:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not one of {', '.join(known)}, the families "
            "known so far; docs/adding-a-model.md says how to add one"
        )

    family = family_of(str(model_type))
    architectures = config.get("architectures") or [family.ARCHITECTURE]
    settings = HfConfig(config, where)
    settings.require(
        ("architectures", architectures, [family.ARCHITECTURE]),
        ("quantization_config", config.get("quantization_config"), None),
    )
    try:
        shape = family.shape(settings)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: a setting is not what it should be ({error})") from error
    _require_sizes(shape, where)
    return shape


_LARGEST = {
    "num_layers": 1 << 14,
    "hidden_size": 1 << 20,
    "ffn_hidden_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_query_groups": 1 << 16,
    "kv_channels": 1 << 16,
    "vocab_size": 1 << 28,
    "max_position_embeddings": 1 << 40,
    "num_experts": 1 << 16,
}
"""Far beyond any model: what is larger is a mistake, and a list of its layers would take all memory.
"""


def _require_sizes(shape: ModelShape, where: str) -> None:
    """Refuse numbers that are no sizes.

    Raises:
        CheckpointError: names the first one.
    """
    for name, largest in _LARGEST.items():
        size = getattr(shape, name)
        if size is not None and not 0 < size <= largest:
            raise CheckpointError(
                f"{where}: {name} would be {shown(size)}; a number from 1 to {largest:,} was expected"
            )


def parameters_of(shape: ModelShape) -> tuple[Parameter, ...]:
    """Return the parameter map of a shape's family."""
    return family_of(shape.model_type).parameters(shape)


def extra_states_of(shape: ModelShape) -> tuple[ExtraState, ...]:
    """Return the extra states that a Megatron model of a shape may ask a checkpoint for."""
    return family_of(shape.model_type).extra_states(shape)


def pieces_of(shape: ModelShape) -> list[tuple[Parameter, tuple[int, ...]]]:
    """Return every tensor of a model that is converted by itself (`pieces_in`)."""
    return pieces_in(parameters_of(shape), shape)


def pieces_in(
    parameters: Sequence[Parameter], shape: ModelShape
) -> list[tuple[Parameter, tuple[int, ...]]]:
    """Return every tensor of a parameter map that is converted by itself.

    Each is a parameter, and its place in the leading axes. Their order is the model's: the
    embedding, layer after layer, what follows the layers.
    """
    pieces = []
    for parameter in parameters:
        axes = [range(size) for size in parameter.stack(shape)]
        pieces += [(parameter, place) for place in itertools.product(*axes)]

    def position(piece: tuple[Parameter, tuple[int, ...]]) -> int:
        parameter, place = piece
        if place:
            return place[0]
        return -1 if parameter.megatron.startswith("embedding.") else shape.num_layers

    return sorted(pieces, key=position)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the name and the shape of every Hugging Face tensor of a model, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, place in pieces_of(shape):
        shapes.update(zip(parameter.hf_names(place), parameter.shapes, strict=True))
    return shapes


def stored_names(name: str, shape: ModelShape, stored: Container[str]) -> tuple[str, ...]:
    """Return the names that a tensor of the map has in a checkpoint.

    A tied embedding may have that of the output layer, or both.

    Args:
        name: of the tensor in the map.
        stored: the names in the checkpoint.
    """
    if name == TIED_TO and shape.tied_embeddings and TIED_COPY in stored:
        return (name, TIED_COPY) if name in stored else (TIED_COPY,)
    return (name,)
