"""Two adapters, in PEFT's format or in the checkpoint of a LoRA run, compared tensor by tensor.

Names are those of PEFT. The scale before B A counts as well: with another one, equal tensors are
another adapter. No configuration of the model is needed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from torch import Tensor

from miles.architecture.adapter import ADAPTER as KEYS
from miles.architecture.adapter import PEFT_PREFIX, TARGETS, AdapterShape, module_of
from miles.common import storage
from miles.common.checkpoint_tracker import TRACKER
from miles.convert import parallel, tensor_io, torch_dist
from miles.convert.differences import Comparison, Difference, difference_of, only_in
from miles.convert.peft_config import CONFIG, read_config
from miles.convert.safetensors_files import Spec, Weights
from miles.convert.safetensors_headers import ADAPTER
from miles.convert.saved_adapter import saved_adapter
from miles.convert.torch_dist import Checkpoint
from miles.errors import CheckpointError

_KEY = re.compile(re.escape(KEYS) + rf"\.(?P<target>{'|'.join(TARGETS)})\.(?P<matrix>lora_[AB])")

_MOST_LAYERS = 1 << 14
"""Far beyond any model."""


@dataclass(frozen=True)
class _Adapter:
    """An adapter that is open."""

    where: str
    scale: float
    tensors: Mapping[str, Spec]
    """by PEFT's names"""
    read: Callable[[str, Tensor], Tensor]
    """fills a tensor with the one of a name"""


def are_adapters(one: str, other: str) -> bool:
    """Return whether two folders (fsspec URLs) hold adapters.

    Raises:
        CheckpointError: one does, and the other holds a model.
    """
    adapters = [url for url in (one, other) if _is_adapter(url)]
    if len(adapters) == 1:
        model = other if adapters[0] == one else one
        raise CheckpointError(
            f"{adapters[0]}: an adapter, which cannot be compared with a model, {model}: merge it "
            "first, with miles convert merge-adapter"
        )
    return bool(adapters)


def compare_adapters(one: str, other: str, console: Console | None) -> Comparison:
    """Compare two adapters.

    Raises:
        CheckpointError: one cannot be read.
    """
    with _opened(one, console) as a, _opened(other, console) as b:
        names = sorted(set(a.tensors) | set(b.tensors))

        def compare(name: str, report: storage.Report) -> Difference | None:
            if name not in a.tensors or name not in b.tensors:
                return only_in(name, a.where if name in a.tensors else b.where)
            difference = difference_of(name, _read(a, name, "first"), _read(b, name, "second"))
            report(a.tensors[name].num_bytes)
            return difference

        num_bytes = sum(spec.num_bytes for spec in a.tensors.values())
        with parallel.bar(console, "comparing", num_bytes) as report:
            differences = list(filter(None, parallel.each(names, compare, report)))
        if a.scale != b.scale:
            differences.append(Difference("scale of all", f"{a.scale:g} and {b.scale:g}"))
        return Comparison(len(names), num_bytes, tuple(differences))


def _is_adapter(url: str) -> bool:
    if any(storage.exists(storage.join(url, name)) for name in (TRACKER, "metadata.json")):
        return saved_adapter(torch_dist.newest(url)) is not None
    return storage.exists(storage.join(url, CONFIG))


@contextlib.contextmanager
def _opened(url: str, console: Console | None) -> Iterator[_Adapter]:
    """Open an adapter of either format. A remote checkpoint is copied while the context lasts."""
    if storage.exists(storage.join(url, CONFIG)):
        config = read_config(url)
        weights = Weights(url, single=ADAPTER)
        scale = AdapterShape(config.rank, config.alpha, (), config.is_rank_stabilized).scale
        yield _Adapter(url, scale, weights.tensors, weights.read)
        return

    checkpoint_url = torch_dist.newest(url)
    adapter = saved_adapter(checkpoint_url)
    assert adapter is not None, "are_adapters has seen one"
    watch = partial(parallel.bar, console, "downloading")
    with storage.local_folder(checkpoint_url, "Megatron checkpoint", watch=watch) as folder:
        checkpoint = Checkpoint(folder, checkpoint_url)
        places = _places_in(checkpoint)
        dtypes = checkpoint.dtypes

        tensors: dict[str, Spec] = {}
        for name, (key, _) in places.items():
            tensors[name] = Spec(dtypes[key], tuple(checkpoint.tensors[key].size[1:]))

        def read(name: str, target: Tensor) -> Tensor:
            key, layer = places[name]
            offsets = (layer, *(0 for _ in target.shape))
            checkpoint.read(key, offsets, target.view(1, *target.shape))
            return target

        yield _Adapter(checkpoint_url, adapter.scale, tensors, read)


def _places_in(checkpoint: Checkpoint) -> dict[str, tuple[str, int]]:
    """Return the key and the layer of each tensor of an adapter, by PEFT's names."""
    places: dict[str, tuple[str, int]] = {}
    for key, stored in checkpoint.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or len(stored.size) != 3 or stored.size[0] > _MOST_LAYERS:
            raise CheckpointError(f"{checkpoint.where}: tensor {key} is not one of an adapter")
        for layer in range(stored.size[0]):
            module = module_of(match["target"]).format(layer=layer)
            places[f"{PEFT_PREFIX}{module}.{match['matrix']}.weight"] = (key, layer)
    return places


def _read(adapter: _Adapter, name: str, use: str) -> Tensor:
    spec = adapter.tensors[name]
    return adapter.read(name, tensor_io.buffer(use, spec.shape, spec.dtype))
