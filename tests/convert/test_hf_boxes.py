"""Any box of a Megatron tensor is what the layout says, from any store, in little memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miles.architecture import families
from miles.architecture.config import ModelShape
from miles.architecture.families import (
    TIED_COPY,
    TIED_TO,
    hf_shapes,
    model_types,
    parameters_of,
    read_shape,
)
from miles.architecture.parameters import Parameter
from miles.common import storage
from miles.convert import box_writer, hf_boxes
from miles.convert.box_writer import BoxWriter
from miles.convert.expected_tensors import require_weights
from miles.convert.hf_boxes import HfTensors, RowRun, open_weights, runs_in
from miles.convert.safetensors_files import ShardedWriter, Spec, Weights
from miles.convert.safetensors_headers import SINGLE
from miles.errors import CheckpointError
from tests.support.launch import QWEN3
from tests.support.models import make_hf
from tests.support.processes import PROJECT

DTYPES = (torch.float32, torch.bfloat16)


def shape_of(model_type: str) -> ModelShape:
    """Return sizes of which no two are the same: 3 groups of 2 heads of 5, 2 layers, 37 rows."""
    return ModelShape(
        *(model_type, 2, 14, 22, 6, 3, 5, 37, 64, 1e6, 1e-6, False),
        qk_layernorm="qwen3" in model_type,
        add_qkv_bias=model_type == "qwen2",
        num_experts=4 if model_type.endswith("moe") else None,
        moe_ffn_hidden_size=8,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """The URL of a model of every family, local and remote."""
    urls = {}

    for model_type in model_types():
        folder = tmp_path_factory.mktemp(model_type)
        generator = torch.Generator().manual_seed(3)
        tensors = {
            name: torch.randn(sizes, generator=generator)
            for name, sizes in hf_shapes(shape_of(model_type)).items()
        }

        save_file(tensors, folder / SINGLE)
        urls[model_type, "local"] = str(folder)
        urls[model_type, "remote"] = f"memory://{folder.name}"
        storage.upload_folder(folder, urls[model_type, "remote"])
    return urls


@cache
def opened(url: str, model_type: str) -> HfTensors:
    return HfTensors(Weights(url), shape_of(model_type))


def converted(folder: str, parameter: Parameter, place: tuple[int, ...], rows: int) -> torch.Tensor:
    """Return a Megatron tensor as the layout alone makes it, with rows of zeros up to a number."""
    stored = load_file(Path(folder, SINGLE))
    tensor = torch.zeros(rows, *parameter.shape[1:])
    parts = parameter.layout(tensor[: parameter.shape[0]])
    for name, part in zip(parameter.hf_names(place), parts, strict=True):
        part.copy_(stored[name].view(part.shape))
    return tensor


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_any_box_is_the_one_of_the_layout(folders: dict[Any, str], data: Any) -> None:
    model_type = data.draw(st.sampled_from(model_types()))
    shape = shape_of(model_type)
    parameter = data.draw(st.sampled_from(parameters_of(shape)), label="parameter")
    place = tuple(data.draw(st.integers(0, size - 1)) for size in parameter.stack(shape))
    num_rows = parameter.shape[0] + (3 if parameter.is_vocabulary else 0)
    offsets: list[int] = []
    ends: list[int] = []
    for size in (num_rows, *parameter.shape[1:]):
        is_whole = data.draw(st.booleans())
        begin = 0 if is_whole else data.draw(st.integers(0, size - 1))
        offsets.append(begin)
        ends.append(size if is_whole else data.draw(st.integers(begin + 1, size)))
    dtype = data.draw(st.sampled_from(DTYPES))
    where = data.draw(st.sampled_from(("local", "remote")))

    sizes = [end - offset for end, offset in zip(ends, offsets, strict=True)]
    target = torch.full(sizes, 7.0, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_boxes, "CHUNK_BYTES", data.draw(st.sampled_from((1, 150, 1000))))
        tensors = opened(folders[model_type, where], model_type)
        tensors.read(parameter.megatron, place, offsets, target)

    expected = converted(folders[model_type, "local"], parameter, place, num_rows)
    assert torch.equal(target, expected[*map(slice, offsets, ends)].to(dtype))


def test_a_target_that_is_a_view(folders: dict[Any, str]) -> None:
    """The ranks' weights are parts of larger buffers, and some are not contiguous."""
    shape = shape_of("llama")
    parameter = next(p for p in parameters_of(shape) if "linear_fc2" in p.megatron)
    expected = converted(folders["llama", "local"], parameter, (1,), parameter.shape[0])
    room = torch.zeros(parameter.shape[1], parameter.shape[0])
    tensors = opened(folders["llama", "local"], "llama")
    tensors.read(parameter.megatron, (1,), (0, 0), room.t())
    assert torch.equal(room.t(), expected)


@pytest.mark.parametrize("names", [(TIED_TO, TIED_COPY), (TIED_COPY,)])
def test_a_tied_embedding_is_written_under_the_names_it_had(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    shape = replace(shape_of("qwen3"), tied_embeddings=True)
    sizes = (shape.vocab_size, shape.hidden_size)
    specs = {name: Spec(torch.float32, sizes) for name in names}
    ShardedWriter(tmp_path, specs, dict.fromkeys(specs, SINGLE)).close()

    writer = BoxWriter(tmp_path, shape)
    values = torch.randn(sizes)
    num_bytes = writer.write("embedding.word_embeddings.weight", (), (0, 0), values)
    assert num_bytes == len(names) * values.nbytes
    writer.close()
    written = load_file(tmp_path / SINGLE)
    assert written.keys() == set(names)
    assert all(torch.equal(tensor, values) for tensor in written.values())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    shape = families.shape_of({**QWEN3, "num_hidden_layers": 28, "tie_word_embeddings": False}, "")
    with pytest.raises(
        CheckpointError,
        match=f"{tmp_path}: a checkpoint of another model: num_layers is 36 in the checkpoint, 28 "
        "in the configuration; untie_embeddings_and_output_weights is False in",
    ):
        open_weights(str(tmp_path), shape)


def test_quantized_weights_are_no_start(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf", "qwen3", tied=True)
    shape = read_shape(str(folder))
    require_weights(str(folder), shape)

    tensors = load_file(folder / "model.safetensors")
    norms = [name for name in tensors if name.endswith("q_norm.weight")]
    for dtype in (torch.int8, torch.float8_e4m3fn):
        tensors.update({name: tensors[name].to(dtype) for name in norms})
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"are {dtype}: quantized weights cannot be"):
            require_weights(str(folder), shape)


def test_rows_of_a_grouped_projection() -> None:
    shape = shape_of("qwen3")
    parameter = next(p for p in parameters_of(shape) if p.megatron.endswith("linear_qkv.weight"))
    # A group is 10 rows of queries, 5 of its key, 5 of its value.
    queries, keys, values = runs_in(parameter, 15, 45)
    assert queries == [RowRun(10, 20, 10), RowRun(20, 40, 5)]
    assert keys == [RowRun(5, 30, 5)]
    assert values == [RowRun(0, 15, 5), RowRun(5, 35, 5)]


MEASURE = """
import json, sys, torch
from pathlib import Path
from miles.architecture.families import shape_of
from miles.convert.hf_boxes import HfTensors
from miles.convert.safetensors_files import Weights

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

folder = sys.argv[1]
config = json.loads(Path(folder, "config.json").read_text())
tensors = HfTensors(Weights(folder), shape_of(config, folder))
quarter = torch.ones(2048, 8192)
before = peak()
tensors.read("decoder.layers.mlp.linear_fc2.weight", (0,), (0, 8192), quarter)
print(peak() - before)
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model whose down projection has 256 MB, in a file with holes for zeros."""
    sizes = {"hidden_size": 2048, "intermediate_size": 32_768, "num_hidden_layers": 1}
    config = {**QWEN3, **sizes, "vocab_size": 8, "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(families.shape_of(config, ""))
    specs = {name: Spec(torch.float32, sizes) for name, sizes in shapes.items()}
    ShardedWriter(tmp_path, specs, dict.fromkeys(specs, SINGLE)).close()
    return tmp_path


def test_columns_take_a_buffer_and_no_more(large: Path) -> None:
    """A rank's quarter of the columns: the tensor of 256 MB is never in memory."""
    words = [sys.executable, "-c", MEASURE, str(large)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT, check=True)
    assert int(done.stdout) < 64e6, f"{int(done.stdout):,} bytes"


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_boxes_of_a_grid_write_the_file_again(folders: dict[Any, str], data: Any) -> None:
    """Any grid over any tensor, in any order: every byte is written, once, and none beside."""
    model_type = data.draw(st.sampled_from(model_types()))
    shape = shape_of(model_type)
    parameter = data.draw(st.sampled_from(parameters_of(shape)), label="parameter")
    place = tuple(0 for _ in parameter.stack(shape))
    num_rows = parameter.shape[0] + (3 if parameter.is_vocabulary else 0)
    values = converted(folders[model_type, "local"], parameter, place, num_rows)
    values[parameter.shape[0] :] = 7.0  # rows of padding are left out

    cuts = []
    for size in values.shape:
        inner = data.draw(st.sets(st.integers(1, size - 1), max_size=2)) if size > 1 else set()
        cuts.append(list(pairwise([0, *sorted(inner), size])))
    boxes = data.draw(st.permutations(list(itertools.product(*cuts))))

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(box_writer, "CHUNK_BYTES", data.draw(st.sampled_from((1, 150, 1000))))
        specs = {hf_name: Spec(torch.float32, sizes) for hf_name, sizes in hf_shapes(shape).items()}
        ShardedWriter(Path(name), specs, dict.fromkeys(specs, SINGLE)).close()
        writer = BoxWriter(Path(name), shape)
        num_bytes = 0
        for box in boxes:
            part = values[*(slice(*cut) for cut in box)]
            offsets = [begin for begin, _ in box]
            num_bytes += writer.write(parameter.megatron, place, offsets, part)
        writer.close()
        written = load_file(Path(name, SINGLE))

    assert num_bytes == values[: parameter.shape[0]].nbytes
    stored = load_file(Path(folders[model_type, "local"], SINGLE))
    own = parameter.hf_names(place)
    for hf_name, tensor in written.items():
        expected = stored[hf_name] if hf_name in own else torch.zeros_like(stored[hf_name])
        assert torch.equal(tensor, expected), hf_name
