"""Files are those that safetensors writes; what is wrong with one is said by file and tensor."""

from __future__ import annotations

import itertools
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miles.convert.safetensors_files import DTYPES, ShardedWriter, Spec, Weights, split_into_files
from miles.convert.safetensors_headers import INDEX, TYPES
from miles.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.arange(4, dtype=torch.bfloat16),
    "é": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
    "half": torch.arange(3, dtype=torch.float16),
    **{str(dtype): torch.ones(3, 5).to(dtype) for dtype in DTYPES.values()},
}


def write(folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, str]) -> None:
    planned = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = ShardedWriter(folder, planned, files)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.sync()
    writer.close()


def read(weights: Weights, name: str) -> torch.Tensor:
    stored = weights.tensors[name]
    return weights.read(name, torch.empty(stored.shape, dtype=stored.dtype))


def test_the_bytes_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, dict.fromkeys(TENSORS, "model.safetensors"))
    save_file(TENSORS, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "theirs.safetensors"
    ).read_bytes()
    weights = Weights(str(tmp_path))
    assert weights.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(
            read(weights, name).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
        ), name


def test_the_types_of_headers_are_those_of_torch() -> None:
    assert [str(dtype) for dtype in DTYPES.values()] == [str(stored) for stored in TYPES.values()]
    for name, dtype in DTYPES.items():
        assert TYPES[name].num_bytes == dtype.itemsize
        assert TYPES[name].is_trainable == (dtype.is_floating_point and dtype.itemsize > 1)


def test_a_tensor_larger_than_one_call_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles.convert.tensor_io._READ_BYTES", 7)
    monkeypatch.setattr("miles.convert.tensor_io._WRITE_BYTES", 5)
    tensors = {"a": torch.arange(100.0)}
    write(tmp_path, tensors, {"a": "model.safetensors"})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensors["a"])
    assert torch.equal(read(Weights(str(tmp_path)), "a"), tensors["a"])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 60))
@settings(deadline=None)
def test_files_are_no_larger_than_asked(sizes: list[int], max_bytes: int) -> None:
    tensors = {f"t{number}": Spec(torch.uint8, (size,)) for number, size in enumerate(sizes)}
    files = split_into_files(tensors, max_bytes)
    assert list(files) == list(tensors)
    members: dict[str, list[int]] = {}
    for name, file in files.items():
        members.setdefault(file, []).append(tensors[name].num_bytes)
    assert list(members) == sorted(members)  # in the order of the model
    for held in members.values():
        assert sum(held) <= max_bytes or len([size for size in held if size]) == 1
    whole = list(members.values())
    for one, after in itertools.pairwise(whole):
        assert sum(one) + after[0] > max_bytes  # no smaller than need be
    if len(members) == 1:
        assert set(members) == {"model.safetensors"}
    else:
        assert list(members) == [
            f"model-{n:05d}-of-{len(members):05d}.safetensors" for n in range(1, len(members) + 1)
        ]


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"there/{message}"):
        Weights(str(folder), "there")


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    save_file({"a": torch.arange(10.0), "b": torch.arange(10.0)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for num_bytes, message in [
        (
            len(whole) - 1,
            r"model\.safetensors: truncated: tensor b ends at byte \d+, the file at \d+",
        ),
        (len(whole) - 41, r"model\.safetensors: truncated: tensor a ends at byte"),
        (
            8 + length - 1,
            r"model\.safetensors: truncated: \d+ bytes; its header alone has",
        ),
        (4, r"model\.safetensors: not a safetensors file, or truncated: 4 bytes"),
        (0, r"model\.safetensors: not a safetensors file, or truncated: 0 bytes"),
    ]:
        (tmp_path / "model.safetensors").write_bytes(whole[:num_bytes])
        refused(tmp_path, message)
    (tmp_path / "model.safetensors").write_bytes(whole + b"x")
    refused(tmp_path, r"model\.safetensors: bytes that belong to no tensor")
    (tmp_path / "model.safetensors").write_bytes(whole)
    weights = Weights(str(tmp_path), "there")
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])  # after the header was looked at
    with pytest.raises(
        CheckpointError,
        match=r"there/model\.safetensors: truncated: tensor b: it ends 1 bytes too early",
    ):
        read(weights, "b")


def header(entries: Any, content: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 16, r"not a safetensors file: its header would have"),
        (header(b"[]"), "not a safetensors header"),
        (header(b"\xff\xfe"), "not a safetensors header"),
        (
            header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
            "not a safetensors header",
        ),
        (
            header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
            "not a safetensors header",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
            "tensor a does not have the",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
            "not a safetensors header",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
            "bytes that belong to no",
        ),
    ],
)
def test_headers_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, rf"model\.safetensors: {message}")


def test_an_index_that_misfits_its_files(tmp_path: Path) -> None:
    refused(tmp_path, r"model\.safetensors: no such file, nor model\.safetensors\.index\.json$")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(
        tmp_path,
        r"model\.safetensors: no such file, .*; pytorch_model\.bin, which is there, is a pickle",
    )
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    refused(
        tmp_path,
        r"two\.safetensors: no such file; model\.safetensors\.index\.json puts tensor b there",
    )
    index(tmp_path, {"a": "one.safetensors"})
    refused(tmp_path, r"one\.safetensors: tensor b is not in model\.safetensors\.index\.json")
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"})
    refused(
        tmp_path,
        r"one\.safetensors: tensor c is missing, which model\.safetensors\.index\.json puts there",
    )
    (tmp_path / INDEX).write_text("{}")
    refused(tmp_path, r"model\.safetensors\.index\.json: not an index")
    (tmp_path / INDEX).write_text("no JSON")
    refused(tmp_path, r"model\.safetensors\.index\.json: not an index")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ""]
)
def test_index_entries_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    index(folder, {"a": name})
    refused(
        folder,
        rf"model\.safetensors\.index\.json: tensor a: {name} leads out of the folder: refused",
    )


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "one.safetensors"])
def test_links_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    if name == "model.safetensors":
        (folder / "one.safetensors").rename(folder / name)
    else:
        index(folder, {"a": "one.safetensors"})
    assert Weights(str(folder)).tensors.keys() == {"a"}
    (folder / name).rename(tmp_path / "outside")
    os.symlink(tmp_path / "outside", folder / name)
    with pytest.raises(CheckpointError, match=f"{name} leads out of the folder: refused"):
        Weights(str(folder))
    (folder / name).unlink()
    (tmp_path / "outside").rename(folder / "kept")
    os.symlink("kept", folder / name)  # within the folder: as good as a file
    assert Weights(str(folder)).tensors.keys() == {"a"}


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.sampled_from([2**70, 1.5, "F32", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner)
    ),
    max_leaves=4,
)


@given(
    st.sampled_from(["a", "b"]),
    st.sampled_from(["dtype", "shape", "data_offsets", None]),
    ANY,
    st.integers(0, 40),
)
@settings(deadline=None, max_examples=300)
def test_any_header_is_read_or_refused(
    name: str, field: str | None, value: Any, num_bytes: int
) -> None:
    changed = {**HEADER, name: {**HEADER[name], field: value} if field else value}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.safetensors").write_bytes(header(changed, bytes(num_bytes)))
        try:
            weights = Weights(folder)
        except CheckpointError:
            return
        assert sum(read(weights, tensor).nbytes for tensor in weights.tensors) == num_bytes
