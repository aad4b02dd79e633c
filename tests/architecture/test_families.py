"""Every family, both ways: nothing lost, the same logits, any layout. docs/convert.md has the results.

`MILES_WRITE_DOCS=1 pytest tests/architecture/test_families.py` writes its table anew.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.architecture.families import model_types, read_shape
from miles.architecture.parameters import EXPERTS_NORM, FUSED_NORM
from miles.common.checkpoint_folder import SavedCheckpoint
from miles.convert.export_plan import ExportPlan
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.verify import verify
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from tests.support.models import make_hf, require_same_files
from tests.support.ranks import run_ranks, start, trainer_settings

PAGE = Path(__file__).parents[2] / "docs/convert.md"
MAX_LOGIT_DIFFERENCE = 1e-4
VOCAB_SIZE = 193
"""Two tensor-parallel ranks add a row of padding."""


@dataclass(frozen=True)
class Model:
    """A tiny model of a family."""

    model_type: str
    tied: bool
    dtype: torch.dtype = torch.float32


MODELS = {
    "Qwen3, tied": Model("qwen3", True),
    "Qwen3, untied": Model("qwen3", False),
    "Qwen3, bfloat16": Model("qwen3", False, torch.bfloat16),
    "Qwen3-MoE": Model("qwen3_moe", False),
    "Qwen2.5, tied": Model("qwen2", True),
    "Qwen2.5, untied": Model("qwen2", False),
    "Llama 3, tied": Model("llama", True),
    "Llama 3, untied": Model("llama", False),
}
LAYOUTS = {"TP 2": Layout(2, tensor=2), "PP 2": Layout(2, pipeline=2), "EP 2": Layout(2, expert=2)}
MOE_LAYOUTS = {
    "TP 2 with experts": Layout(2, tensor=2, expert_tensor=2, sequence_parallel=True),
    "TP 2 x EP 2 with experts": Layout(
        4, tensor=2, expert_tensor=2, sequence_parallel=True, expert=2
    ),
}
TO_MEGATRON = (
    "to Megatron: keys of `GPTModel`",
    "to Megatron: logits",
    "to Megatron: logits, packed",
)
BACK = "and back: every file"
COLUMNS = [
    *TO_MEGATRON,
    BACK,
    *(f"loaded at {layout}, saved, and back: every file" for layout in LAYOUTS),
]
table: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Converted:
    """A model in both formats, as it was made and as it was converted."""

    hf: str
    megatron: str


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    made = {}
    for number, (name, model) in enumerate(MODELS.items()):
        folder = tmp_path_factory.mktemp(f"model-{number}")
        hf = make_hf(
            folder / "hf",
            model.model_type,
            tied=model.tied,
            vocab_size=VOCAB_SIZE,
            dtype=model.dtype,
        )
        hf_to_megatron(str(hf), str(folder / "megatron"))
        made[name] = Converted(str(hf), str(folder / "megatron"))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_byte(
    converted: dict[str, Converted], name: str, tmp_path: Path
) -> None:
    """Compare all files byte by byte: safetensors, configuration and template."""
    model = converted[name]
    assert (Path(model.megatron) / "latest_checkpointed_iteration.txt").read_text() == "release"
    megatron_to_hf(model.megatron, model.hf, str(tmp_path / "back"))
    require_same_files(Path(model.hf), tmp_path / "back")
    table[name, BACK] = "the same"


def logits(
    layout: Layout, rank: int, meeting: Path, models: list[Converted], texts: list[list[int]]
) -> list[tuple[set[str], list[np.ndarray], list[np.ndarray]]]:
    """Return the keys of real GPTModels, and the logits of each text alone and of all in one row."""
    from miles.common import checkpoint_folder
    from miles.data.packing.micro_batch import micro_batch
    from miles.train.model.device_batch import send
    from miles.train.model.packed_forward import forward_packed
    from miles.train.rank import checkpoint_load
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    lengths = np.array([len(text) for text in texts], np.int32)
    row = micro_batch(
        np.concatenate(texts).astype(np.int32),
        np.zeros(lengths.sum(), np.uint8),
        lengths,
        np.arange(len(texts)),
        np.zeros(len(texts), np.int32),
    )
    found = []
    for model in models:
        shape = read_shape(model.hf)
        trainer = Trainer(trainer_settings(shape, layout, num_sources=1), rank)
        keys = set()
        for value in trainer.gpt.sharded_state_dict().values():
            keys |= {
                getattr(part, "key", "")
                for part in (value.build() if hasattr(value, "build") else [value])
            }
        newest = checkpoint_folder.find(model.megatron)
        assert newest is not None
        checkpoint_load.load(trainer, newest, model_only=True)
        alone = [trainer.logits(text) for text in texts]
        with torch.no_grad():
            packed = forward_packed(trainer.gpt, send(row), with_labels=False)[0].float().numpy()
        found.append((keys, alone, np.split(packed, np.cumsum(lengths)[:-1])))
    return found


@pytest.mark.slow
def test_megatron_and_transformers_give_the_same_logits(converted: dict[str, Converted]) -> None:
    from megatron.core.dist_checkpointing import load_tensors_metadata
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB_SIZE, length).tolist() for length in (150, 33, 80)]
    names = [name for name, model in MODELS.items() if model.dtype == torch.float32]
    (got,) = run_ranks(logits, Layout(1), [converted[name] for name in names], texts)
    for name, (keys, alone, packed) in zip(names, got, strict=True):
        stored = set(load_tensors_metadata(f"{converted[name].megatron}/release"))
        expected_keys = {key for key in keys if not key.endswith("_extra_state")}
        if FUSED_NORM in stored and EXPERTS_NORM in stored:  # of Transformer Engine's layers
            stored.remove(EXPERTS_NORM)
        assert stored == expected_keys
        table[name, TO_MEGATRON[0]] = "the same"
        model = AutoModelForCausalLM.from_pretrained(converted[name].hf, dtype=torch.float32)
        with torch.no_grad():
            expected = [model(torch.tensor([text])).logits[0].numpy() for text in texts]
        assert all(np.abs(one).max() > 0.1 for one in expected)
        for column, ours in ((TO_MEGATRON[1], alone), (TO_MEGATRON[2], packed)):
            for one, other in zip(ours, expected, strict=True):
                assert np.abs(one - other).max() < MAX_LOGIT_DIFFERENCE, (name, column)
            table[name, column] = f"within {MAX_LOGIT_DIFFERENCE:.0e}"


def reload(
    layout: Layout, rank: int, meeting: Path, models: list[Converted], saves: list[str]
) -> None:
    """Load the converted checkpoints into ranks of a layout, and save them, as training does.

    The ranks also write an export. Started straight from the Hugging Face folder, they have the
    same weights, bit by bit.
    """
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    for model, save in zip(models, saves, strict=True):
        is_bf16 = "bfloat16" in Path(model.hf, "config.json").read_text()
        precision = Precision.BF16 if is_bf16 else Precision.FP32
        shape = read_shape(model.hf)
        trainer = Trainer(trainer_settings(shape, layout, num_sources=1, precision=precision), rank)
        found = checkpoint_folder.find(model.megatron)
        assert found is not None
        checkpoint_load.load(trainer, found, model_only=True)
        checkpoint_writer.save(trainer, save, 1, {}, model_only=True)
        write_export(trainer, model, Path(f"{save}-ranks"))
        require_straight_start(trainer, model, found)

    # Weights that are stored in another dtype than they are trained in.
    shape = read_shape(models[0].hf)
    trainer = Trainer(
        trainer_settings(shape, layout, num_sources=1, precision=Precision.BF16), rank
    )
    found = checkpoint_folder.find(models[0].megatron)
    assert found is not None
    require_straight_start(trainer, models[0], found)


def write_export(trainer: Any, model: Converted, folder: Path) -> None:
    """Export the weights of all ranks."""
    from miles.train.rank import weight_boxes

    plan = ExportPlan(model.hf, trainer.shape, defaultdict(lambda: torch.float32))
    if trainer.rank == 0:
        folder.mkdir()
        plan.create(folder).close()
        plan.complete(folder, None)
    torch.distributed.barrier()

    part = weight_boxes.write_weights(trainer, folder)
    assert part.failure is None
    num_bytes = torch.tensor(part.num_bytes)
    torch.distributed.all_reduce(num_bytes)
    assert num_bytes == plan.num_bytes, "each byte is written once"


def require_straight_start(trainer: Any, model: Converted, found: SavedCheckpoint) -> None:
    """Assert that a rank gets the same weights from either format, and its optimizer, too."""
    from miles.train.rank import checkpoint_load

    def all_weights() -> list[torch.Tensor]:
        groups = trainer.optimizer.param_groups
        masters = [master for group in groups for master in group["params"]]
        return [weight.detach() for weight in (*trainer.gpt.parameters(), *masters)]

    checkpoint_load.load(trainer, found, model_only=True)
    expected = [weight.clone() for weight in all_weights()]
    for weight in all_weights():
        weight.fill_(float("nan"))
    straight = SavedCheckpoint(model.hf, 0, None, is_hugging_face=True)
    checkpoint_load.load(trainer, straight, model_only=True)

    assert len(expected) > len(list(trainer.gpt.parameters()))
    for weight, other in zip(all_weights(), expected, strict=True):
        assert torch.equal(weight, other), model.hf


def stored_keys(checkpoint: Path) -> set[str]:
    """Return the keys of a checkpoint's tensors and objects."""
    return set(pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, *MOE_LAYOUTS])
def test_loaded_and_saved_at_any_layout(
    converted: dict[str, Converted], layout: str, tmp_path: Path
) -> None:
    if layout == "EP 2" or layout in MOE_LAYOUTS:
        names = ["Qwen3-MoE"]
    else:
        names = [name for name in MODELS if name != "Qwen3-MoE" or layout == "PP 2"]
    saves = [str(tmp_path / f"{number}") for number in range(len(names))]
    ranks = {**LAYOUTS, **MOE_LAYOUTS}[layout]
    run_ranks(reload, ranks, [converted[name] for name in names], saves)
    for name, save in zip(names, saves, strict=True):
        assert stored_keys(Path(save, "iter_0000001")) == stored_keys(
            Path(converted[name].megatron, "release")
        )
        assert not verify(converted[name].hf, save).differences
        megatron_to_hf(save, converted[name].hf, f"{save}-back")
        require_same_files(Path(converted[name].hf), Path(f"{save}-back"))
        require_same_files(Path(converted[name].hf), Path(f"{save}-ranks"))
        column = f"loaded at {layout.removesuffix(' with experts')}, saved, and back: every file"
        if column in COLUMNS:
            table[name, column] = "the same"


def test_every_family_has_a_model_here() -> None:
    assert model_types() == sorted({model.model_type for model in MODELS.values()})


def test_the_page_shows_what_was_found() -> None:
    """Last in the file: the table is of the tests before it."""
    expected = {
        (name, column)
        for name in MODELS
        for column in COLUMNS
        if not _is_out_of_place(name, column)
    }
    assert expected == set(table), "run the whole file"
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(table.get((name, column), "") for column in COLUMNS) + " |"
        for name in MODELS
    ]
    before, rest = PAGE.read_text().split("<!-- table -->\n")
    _, after = rest.split("<!-- end -->\n")
    page = f"{before}<!-- table -->\n" + "\n".join(lines) + f"\n<!-- end -->\n{after}"
    if os.environ.get("MILES_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "MILES_WRITE_DOCS=1 writes it anew"


def _is_out_of_place(name: str, column: str) -> bool:
    """Logits are compared in float32; experts are what EP spreads."""
    is_float32 = MODELS[name].dtype == torch.float32
    return (column in TO_MEGATRON and not is_float32) or ("EP 2" in column and name != "Qwen3-MoE")
