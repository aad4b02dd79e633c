"""Arrow's padding, and what `to_pylist` makes of types.

struct<a, b>     {"a": 1, "b": None}  ->  {"a": 1}     Arrow gives each struct all of its fields
list             [1, None]            ->  as it is     a null element was written
map              {"k": None}          ->  as it is     so was a key of a map
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import Any

import pyarrow as pa

from miles.data.files.arrow_types import is_any_list


def has_padding(array: pa.Array) -> bool:
    """Return whether fields of structs in an array are null. Their numbers of nulls say it."""
    if pa.types.is_struct(array.type):
        children = array.flatten()
        return any(child.null_count > 0 or has_padding(child) for child in children)
    elements = _elements_of(array)
    return elements is not None and has_padding(elements)


def remove_padding(array: pa.Array, values: list[Any]) -> None:
    """Delete the fields of structs that are null from the values of an array, in place.

    Args:
        values: the array's, or those among them that are not null.
    """
    if not has_padding(array):
        return
    present = [value for value in values if value is not None]

    if pa.types.is_struct(array.type):
        for field, child in zip(array.type, array.flatten(), strict=True):
            name = field.name
            if child.null_count > 0:
                for value in present:
                    if value[name] is None:
                        del value[name]
            remove_padding(child, [value[name] for value in present if name in value])
        return

    elements = _elements_of(array)
    if pa.types.is_dictionary(array.type):
        remove_padding(elements, present)
    elif pa.types.is_map(array.type):
        remove_padding(elements, list(chain.from_iterable(value.values() for value in present)))
    else:
        remove_padding(elements, list(chain.from_iterable(present)))


def _elements_of(array: pa.Array) -> pa.Array | None:
    """Return the values in the lists, maps or dictionary of an array; None: it has none."""
    if is_any_list(array.type):
        return array.flatten()
    if pa.types.is_map(array.type):
        return array.items
    return array.dictionary if pa.types.is_dictionary(array.type) else None


@lru_cache(maxsize=256)
def is_convertible(kind: pa.DataType) -> bool:
    """Return whether this pyarrow can convert values of a type. It is tried on one value."""
    try:
        sample = pa.array([_sample(kind)], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, NotImplementedError):
        sample = pa.nulls(1, kind)  # of a type that is not made from Python's values
    try:
        remove_padding(sample, sample.to_pylist(maps_as_pydicts="strict"))
    except NotImplementedError:
        return False
    return True


def _sample(kind: pa.DataType) -> Any:
    """Return a value of a type: with one element or entry in each list and map."""
    if pa.types.is_struct(kind):
        return {inner.name: _sample(inner.type) for inner in kind}
    if pa.types.is_fixed_size_list(kind):
        return [_sample(kind.value_type)] * kind.list_size
    if pa.types.is_map(kind):
        return [("key", _sample(kind.item_type))]
    return [_sample(kind.value_type)] if is_any_list(kind) else None
