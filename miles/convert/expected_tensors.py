"""The tensors of a Hugging Face checkpoint against those that a model has, by their headers alone.

    config.json   another model's? -> refused
    headers       a tensor that is missing, unexpected, of another shape or dtype -> refused

Nothing here needs torch, but for the values of an embedding that is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles.architecture.config import ModelShape
from miles.architecture.families import (
    TIED_COPY,
    parameters_of,
    pieces_in,
    read_shape,
    stored_names,
)
from miles.architecture.parameters import Parameter
from miles.convert.mismatch import missing_tensor, unexpected_tensors, wrong_shape
from miles.convert.path_safety import require_inside
from miles.convert.safetensors_headers import TYPES, Headers
from miles.errors import CheckpointError, SourceError


@dataclass(frozen=True)
class ExpectedTensors:
    """The tensors of a model, which are all there."""

    type_names: Mapping[str, str]
    """Megatron key -> the type of its tensors, one of `TYPES`"""
    has_copy: bool
    """the embedding is stored once more as the output layer that is tied to it"""


def require_tensors(
    headers: Headers, shape: ModelShape, parameters: Sequence[Parameter]
) -> ExpectedTensors:
    """Return the tensors of a model in a checkpoint.

    Args:
        headers: of the checkpoint.
        shape: of the model.
        parameters: the map of the tensors in it.

    Raises:
        CheckpointError: names the tensor that is missing, unexpected, of another shape, or of
            another dtype than those that Megatron keeps in one tensor with it.
    """
    expected: set[str] = set()
    first_of_key: dict[str, str] = {}
    type_names: dict[str, str] = {}
    for parameter, place in pieces_in(parameters, shape):
        names = names_in(headers, shape, parameter, place)
        expected.update(names)
        for name, sizes in zip(names, parameter.shapes, strict=True):
            _require_tensor(headers, name, sizes)
            first = first_of_key.setdefault(parameter.megatron, name)
            _require_one_type(headers, name, first, parameter.megatron)
        type_names[parameter.megatron] = headers.tensors[names[0]].type_name

    extra = sorted(set(headers.tensors) - expected)
    has_copy = shape.tied_embeddings and TIED_COPY in extra
    if has_copy:
        extra.remove(TIED_COPY)
    if extra:
        raise unexpected_tensors(f"{headers.where}/{headers.tensors[extra[0]].file}", extra)
    return ExpectedTensors(type_names, has_copy)


def names_in(
    headers: Headers, shape: ModelShape, parameter: Parameter, place: tuple[int, ...]
) -> list[str]:
    """Return the names under which the tensors of a parameter are read from the files."""
    names = parameter.hf_names(place)
    return [stored_names(name, shape, headers.tensors)[0] for name in names]


def require_same_model(url: str, shape: ModelShape) -> None:
    """Refuse a folder whose config.json is that of another model.

    Raises:
        CheckpointError: names each difference.
    """
    require_inside(url, "config.json", url)
    differences = shape.differences(read_shape(url).megatron_args())
    if differences:
        raise CheckpointError(f"{url}: a checkpoint of another model: {'; '.join(differences)}")


def require_weights(url: str, shape: ModelShape) -> None:
    """Refuse a folder whose weights a model cannot begin from. Hardly more than headers are read.

    Raises:
        CheckpointError: a checkpoint of another model; or as `require_tensors` and
            `HfTensors.require_equal_copies` do; or the weights are quantized.
    """
    require_same_model(url, shape)
    try:
        headers = Headers(url)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    found = require_tensors(headers, shape, parameters_of(shape))

    for key, name in found.type_names.items():
        if not TYPES[name].is_trainable:
            raise CheckpointError(
                f"{url}: the tensors of {key} are {TYPES[name]}: quantized weights cannot be "
                "trained; give a folder with bfloat16, float16 or float32"
            )
    if found.has_copy:
        # torch is imported only where there are values to look at.
        from miles.convert.hf_boxes import open_weights

        open_weights(url, shape).require_equal_copies()


def _require_tensor(headers: Headers, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a checkpoint without a tensor, or with one of another shape."""
    stored = headers.tensors.get(name)
    if stored is None:
        raise missing_tensor(headers.where, name)
    if stored.shape != shape:
        raise wrong_shape(f"{headers.where}/{stored.file}", name, stored.shape, shape)


def _require_one_type(headers: Headers, name: str, first: str, key: str) -> None:
    """Refuse tensors of several dtypes that Megatron keeps in one.

    Args:
        name: of the Hugging Face tensor.
        first: the first one that is a part of the same Megatron tensor.
        key: of the Megatron tensor.
    """
    stored = headers.tensors[name]
    first_type = headers.tensors[first].type
    if stored.type != first_type:
        raise CheckpointError(
            f"{headers.where}/{stored.file}: tensor {name} is {stored.type}, {first} {first_type}: "
            f"Megatron keeps them in one tensor, {key}, of one dtype"
        )
