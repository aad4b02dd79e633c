"""What is written is what Megatron itself writes; what Megatron writes is read."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from miles.architecture.families import extra_states_of, pieces_of, read_shape
from miles.convert import tensor_io, torch_dist
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.torch_dist import Checkpoint
from miles.convert.verify import verify
from miles.errors import CheckpointError
from miles.train.parallel_layout import Layout
from tests.support.models import make_hf
from tests.support.pickles import ShellCommand
from tests.support.ranks import run_ranks, start


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("hf") / "hf", "qwen3_moe", tied=False)


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    hf_to_megatron(str(hf), str(hf.parent / "megatron"))
    return hf.parent / "megatron"


@pytest.fixture
def copy(megatron: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return shutil.copytree(megatron, tmp_path / "megatron")


def save_with_megatron(
    layout: Layout, rank: int, meeting: Path, hf: str, folder: str, boxes: str
) -> None:
    """The tensors of a converted checkpoint, saved by Megatron's own `dist_checkpointing`."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    start(layout, rank, meeting)
    shape = read_shape(hf)
    checkpoint = Checkpoint(Path(boxes), boxes)
    model = {}
    for parameter, place in pieces_of(shape):
        tensor = torch.empty(parameter.shape)
        checkpoint.read(
            parameter.megatron,
            (*place, *(0 for _ in parameter.shape)),
            tensor.view(*(1 for _ in place), *parameter.shape),
        )
        offsets = [(axis, place[axis], size) for axis, size in enumerate(parameter.stack(shape))]
        for key in filter(None, (parameter.megatron, parameter.second_key)):
            model[f"{key} {place}"] = ShardedTensor.from_rank_offsets(
                key, tensor, *offsets, prepend_axis_num=len(place)
            )
    for extra in extra_states_of(shape):
        for key in extra.object_keys(shape):
            model[key] = ShardedObject.empty_from_unique_key(key)
    Path(folder).mkdir()
    state = {
        "model": model,
        "args": shape.checkpoint_args(),
        "checkpoint_version": 3.0,
        "iteration": 0,
    }
    dist_checkpointing.save(state, folder)


@pytest.mark.skipif(
    version("megatron-core") >= "0.19", reason="0.19 keeps what is no tensor among the tensors"
)
def test_the_files_are_those_that_megatron_writes(hf: Path, megatron: Path, tmp_path: Path) -> None:
    ours = megatron / "release"
    theirs = tmp_path / "theirs"
    run_ranks(save_with_megatron, Layout(1), str(hf), str(theirs), str(ours))
    assert json.loads((ours / "metadata.json").read_text()) == json.loads(
        (theirs / "metadata.json").read_text()
    )
    common, other = (
        torch.load(folder / "common.pt", weights_only=False) for folder in (ours, theirs)
    )
    assert common == other
    stored = [pickle.loads((folder / ".metadata").read_bytes()) for folder in (ours, theirs)]
    tensors, others = (one.state_dict_metadata for one in stored)
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        if isinstance(tensor, BytesStorageMetadata):
            assert tensor == others[key]
            continue
        assert (tensor.size, tensor.properties) == (others[key].size, others[key].properties)
        assert sorted(tensor.chunks, key=lambda chunk: chunk.offsets) == sorted(
            others[key].chunks, key=lambda chunk: chunk.offsets
        )

    def content(folder: Path, info: Any) -> Any:
        with open(folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            (folder.parent / "box").write_bytes(file.read(info.length))
        return torch.load(folder.parent / "box", weights_only=True)

    assert stored[0].storage_data.keys() == stored[1].storage_data.keys()
    for index in stored[0].storage_data:
        one, other = (
            content(folder, of.storage_data[index])
            for folder, of in zip((ours, theirs), stored, strict=True)
        )
        if isinstance(one, list):  # an empty object
            assert one == other == [None]
        else:
            assert one.shape == other.shape
            assert torch.equal(one, other)


def test_keys_and_types_of_megatron_lm(hf: Path, megatron: Path) -> None:
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "release"
    common = torch.load(megatron / "release/common.pt", weights_only=False)
    assert {name: type(value) for name, value in common.items()} == {
        "args": argparse.Namespace,
        "checkpoint_version": float,
        "iteration": int,
    }
    assert common["checkpoint_version"] == 3.0
    assert common["iteration"] == 0
    kinds: dict[type, str] = {
        int: "num_layers hidden_size ffn_hidden_size seq_length num_attention_heads "
        "num_query_groups kv_channels max_position_embeddings rotary_base padded_vocab_size "
        "num_experts moe_router_topk moe_ffn_hidden_size tensor_model_parallel_size "
        "pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
        "consumed_train_samples skipped_train_samples consumed_valid_samples",
        float: "rotary_percent norm_epsilon attention_dropout hidden_dropout rope_scaling_factor",
        bool: "group_query_attention use_rotary_position_embeddings rotary_interleaved "
        "add_bias_linear add_qkv_bias swiglu qk_layernorm untie_embeddings_and_output_weights "
        "use_rope_scaling moe_router_pre_softmax no_save_optim no_save_rng",
        str: "position_embedding_type normalization tokenizer_type ckpt_format "
        "moe_router_score_function",
    }
    found = vars(common["args"])
    for kind, names in kinds.items():
        for name in names.split():
            assert type(found[name]) is kind, name
    layer, experts = "decoder.layers", "decoder.layers.mlp.experts.experts"
    assert {
        key: tuple(stored.size)
        for key, stored in Checkpoint(megatron / "release", "").tensors.items()
    } == {
        "embedding.word_embeddings.weight": (192, 64),
        f"{layer}.self_attention.linear_qkv.layer_norm_weight": (4, 64),
        f"{layer}.self_attention.linear_qkv.weight": (4, 128, 64),
        f"{layer}.self_attention.q_layernorm.weight": (4, 16),
        f"{layer}.self_attention.k_layernorm.weight": (4, 16),
        f"{layer}.self_attention.linear_proj.weight": (4, 64, 64),
        f"{layer}.mlp.linear_fc1.layer_norm_weight": (4, 64),
        f"{layer}.mlp.router.weight": (4, 4, 64),
        f"{experts}.linear_fc1.weight": (4, 4, 64, 64),
        f"{experts}.linear_fc2.weight": (4, 4, 64, 32),
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (192, 64),
    }


def test_a_box_is_assembled_from_parts(tmp_path: Path, megatron: Path) -> None:
    """It has rows and columns of several stored boxes, as another layout might have saved them."""
    whole = torch.arange(24.0).view(4, 6)
    parts = [((0, 0), (3, 4)), ((0, 4), (3, 2)), ((3, 0), (1, 6))]
    key = "embedding.word_embeddings.weight"
    boxes = [
        torch_dist.Box(
            key,
            at,
            size,
            (4, 6),
            whole.dtype,
            lambda at=at, size=size: _cut(whole, at, size).clone(),
        )
        for at, size in parts
    ]
    places = torch_dist.write_boxes(tmp_path, "__0_0.distcp", boxes, lambda num_bytes: None)
    torch_dist.write_metadata(tmp_path, list(zip(boxes, places, strict=True)), argparse.Namespace())
    checkpoint = Checkpoint(tmp_path, "there")
    for at, size in [((0, 0), (4, 6)), ((1, 2), (3, 3)), ((3, 0), (1, 6)), ((0, 0), (3, 4))]:
        assert torch.equal(checkpoint.read(key, at, torch.zeros(size)), _cut(whole, at, size))
    checkpoint.tensors[key].chunks.pop()
    with pytest.raises(CheckpointError, match=f"there: tensor {key} is incomplete"):
        checkpoint.read(key, (0, 0), torch.zeros(4, 6))


def _cut(whole: torch.Tensor, at: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    return whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]]


def test_values_stored_in_another_order(tmp_path: Path) -> None:
    """A stored tensor is transposed, and one has another dtype: their bytes cannot be copied."""
    key = "decoder.final_layernorm.weight"
    for number, stored in enumerate(
        (torch.arange(6.0).view(3, 2).t(), torch.arange(6.0).view(2, 3).bfloat16())
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        box = torch_dist.Box(
            key, (0, 0), (2, 3), (2, 3), torch.float32, lambda stored=stored: stored
        )
        places = torch_dist.write_boxes(folder, "__0_0.distcp", [box], lambda num_bytes: None)
        torch_dist.write_metadata(folder, [(box, places[0])], argparse.Namespace())
        assert torch.equal(
            Checkpoint(folder, "").read(key, (0, 0), torch.zeros(2, 3)), stored.float()
        )


def edit_metadata(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def rename_tensor(metadata: Any, old: str, new: str) -> None:
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)


def set_size(metadata: Any, key: str, size: tuple[int, ...]) -> None:
    metadata.state_dict_metadata[key].size = torch.Size(size)


def move(metadata: Any, key: str, path: str) -> None:
    for index, info in metadata.storage_data.items():
        if index.fqn == key:
            metadata.storage_data[index] = torch_dist.Place(path, info.offset, info.length)


NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda m: rename_tensor(m, NORM, "decoder.odd"),
            rf"release: tensor {NORM} is missing; config\.json asks for",
        ),
        (
            lambda m: m.state_dict_metadata.update({"decoder.odd": m.state_dict_metadata[NORM]}),
            r"release: config\.json does not ask for tensor decoder\.odd",
        ),
        (
            lambda m: set_size(m, NORM, (65,)),
            rf"release: tensor {NORM} has shape \(65,\); config\.json asks for \(64,\)",
        ),
        (
            lambda m: set_size(m, "output_layer.weight", (100, 64)),
            r"output_layer\.weight has shape \(100, 64\)",
        ),
        (
            lambda m: move(m, NORM, "../../hf/model.safetensors"),
            rf"tensor {NORM}: \.\./\.\./hf/.* leads out",
        ),
        (
            lambda m: move(m, NORM, "__1_0.distcp"),
            r"release, which .* not there, or not complete \(__1_0\.distcp: no such file\)",
        ),
    ],
    ids=["missing", "extra", "shape", "vocabulary", "outside", "file"],
)
def test_a_wrong_tensor_is_refused_by_name(
    hf: Path, copy: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    edit_metadata(copy / "release", damage)
    with pytest.raises(CheckpointError, match=message):
        megatron_to_hf(str(copy), str(hf), str(tmp_path / "back"))
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_broken_file_is_named(hf: Path, copy: Path, tmp_path: Path) -> None:
    file = sorted((copy / "release").glob("*.distcp"))[-2]  # the last is of objects
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(
        CheckpointError,
        match=rf"release/{file.name}: truncated: tensor output_layer\.weight ends at byte",
    ):
        megatron_to_hf(str(copy), str(hf), str(tmp_path / "back"))
    file.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match=rf"release/{file.name}: tensor .* cannot be read"):
        megatron_to_hf(str(copy), str(hf), str(tmp_path / "back"))
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1],
        None,
        torch_dist.Metadata({"decoder.x": 1}),
        torch_dist.Metadata({}, storage_data={1: 2}),
    ],
)
def test_records_that_are_no_checkpoint(hf: Path, copy: Path, tmp_path: Path, content: Any) -> None:
    (copy / "release/.metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=r"release(/\.metadata: not that of a torch_dist|: tensor .* is missing|.*: refused)",
    ):
        megatron_to_hf(str(copy), str(hf), str(tmp_path / "back"))


def test_links_that_lead_out_are_refused(hf: Path, copy: Path, tmp_path: Path) -> None:
    file = sorted((copy / "release").glob("*.distcp"))[0]
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=rf"{file.name} leads out of the folder: refused"):
        megatron_to_hf(str(copy), str(hf), str(tmp_path / "back"))
    shutil.move(copy / "release", tmp_path / "release")
    (copy / "release").symlink_to(tmp_path / "release")
    with pytest.raises(CheckpointError, match="release leads out of the folder: refused"):
        megatron_to_hf(str(copy), str(hf), str(tmp_path / "back"))


def test_arguments_may_lie_among_the_tensors(hf: Path, copy: Path) -> None:
    """megatron-core 0.19 puts what is no tensor there, and writes no common.pt."""
    folder = copy / "release"
    common = torch.load(folder / "common.pt", weights_only=False)
    content = io.BytesIO()
    torch.save([common], content)
    (folder / "common.pt").unlink()
    boxes = sorted(folder.glob("*.distcp"))[0]
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = torch_dist.Place(boxes.name, boxes.stat().st_size, len(content.getvalue()))
    with open(boxes, "ab") as file:
        file.write(content.getvalue())
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    assert Checkpoint(folder, "here").args == vars(common["args"])
    assert not verify(str(hf), str(copy)).differences


def test_only_megatron_arguments_are_unpickled(hf: Path, copy: Path, tmp_path: Path) -> None:
    """Its enumerations, signals and dtypes; in a process that has not imported Megatron yet."""
    common = copy / "release/common.pt"
    code = (
        "import signal, sys, torch\n"
        "from megatron.core.enums import ModelType\n"
        "from megatron.core.transformer.enums import AttnBackend\n"
        "common = torch.load(sys.argv[1], weights_only=False)\n"
        "common['args'].attention_backend = AttnBackend.auto\n"
        "common['args'].model_type = ModelType.encoder_or_decoder\n"
        "common['args'].exit_signal = signal.SIGTERM\n"
        "common['args'].params_dtype = torch.bfloat16\n"
        "torch.save(common, sys.argv[1])\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, common], check=True, capture_output=True
    )
    words = ["convert", "verify", str(hf), str(copy)]
    done = subprocess.run(
        [sys.executable, "-m", "miles.cli", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr

    stranger = torch.load(common, weights_only=False)
    stranger["args"].evil = ShellCommand(f"touch {tmp_path}/ran")
    torch.save(stranger, common)
    with pytest.raises(
        CheckpointError, match=r"release/common\.pt: cannot be read \(Weights only load failed"
    ):
        megatron_to_hf(str(copy), str(hf), str(tmp_path / "back"))
    assert not (tmp_path / "ran").exists()


def test_which_checkpoint_of_a_folder(hf: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy / "release", copy / "iter_0000007")
    changed = load_file(hf / "model.safetensors")
    before = changed["model.norm.weight"].clone()
    changed["model.norm.weight"] += 1
    other = shutil.copytree(hf, tmp_path / "other")
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    hf_to_megatron(str(other), str(tmp_path / "other-megatron"))
    shutil.copytree(tmp_path / "other-megatron/release", copy / "iter_0000123")
    (copy / "latest_checkpointed_iteration.txt").write_text("123")

    def norm(load: Path, **which: Any) -> torch.Tensor:
        megatron_to_hf(str(load), str(hf), str(tmp_path / "back"), **which)
        return load_file(tmp_path / "back/model.safetensors")["model.norm.weight"]

    assert torch.equal(norm(copy), changed["model.norm.weight"])
    assert torch.equal(norm(copy, iteration=7), before)
    assert torch.equal(norm(copy / "iter_0000007"), before)
    there = rf"There are complete checkpoints of steps 7, 123 in {copy}"
    missing = r"not there, or not complete \(.*\)\. "
    with pytest.raises(
        CheckpointError, match=rf"iter_0000008: {missing}{there}: give --ckpt-step 123"
    ):
        norm(copy, iteration=8)
    with pytest.raises(CheckpointError, match=r"a checkpoint itself: leave --ckpt-step out$"):
        norm(copy / "iter_0000007", iteration=7)
    (copy / "latest_checkpointed_iteration.txt").write_text("9")
    way = rf"{there}: give {copy}/iter_0000123, or another of them$"
    with pytest.raises(
        CheckpointError, match=rf"iter_0000009, which latest_.* names: {missing}{way}"
    ):
        norm(copy)
    (copy / "latest_checkpointed_iteration.txt").write_text("../hf")
    with pytest.raises(
        CheckpointError, match=rf"expected an iteration or 'release', found '\.\./hf'\. {way}"
    ):
        norm(copy)
    (copy / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match=rf"iteration\.txt is missing\. {way}"):
        norm(copy)
    with pytest.raises(CheckpointError, match="elsewhere: no such folder: give one with Megatron"):
        norm(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match="converted checkpoint, without steps: leave --ckpt-s"
    ):
        norm(tmp_path / "other-megatron", iteration=8)


def test_memory_is_used_again_and_not_shared() -> None:
    first = tensor_io.buffer("a", (2, 3), torch.float32)
    assert tensor_io.buffer("a", (3,), torch.float32).data_ptr() == first.data_ptr()
    assert tensor_io.buffer("b", (2, 3), torch.float32).data_ptr() != first.data_ptr()
    assert tensor_io.buffer("a", (2, 3), torch.float32).untyped_storage().nbytes() == 24
    assert tensor_io.buffer("c", (0, 3), torch.float32).shape == (0, 3)
