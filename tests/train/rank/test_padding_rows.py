"""A vocabulary that two tensor-parallel ranks cannot divide trains as on one rank.

The checkpoint to begin from has more rows than the vocabulary, none of them zero, as if it had been
padded and trained elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from miles.architecture.families import read_shape
from miles.common import checkpoint_folder
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.torch_dist import Checkpoint
from miles.train.model.padding_rows import num_token_rows
from miles.train.parallel_layout import Layout
from tests.support.models import edit_config, make_hf
from tests.support.ranks import SHAPE, batch, run_ranks, start, trainer_settings

ONE = Layout(1)
TWO = Layout(2, tensor=2)
NUM_TOKENS = SHAPE.vocab_size + 1
"""The tokens of the vocabulary. Two tensor-parallel ranks need a row of padding."""
NUM_STORED_ROWS = 640
NUM_STEPS = 4
SAVED_STEP = 2


@pytest.mark.parametrize(
    ("tensor", "rows"), [(1, [5]), (2, [3, 2]), (4, [2, 2, 1, 0]), (5, [1] * 5)]
)
def test_each_rank_knows_its_tokens(tensor: int, rows: list[int]) -> None:
    shape = replace(SHAPE, vocab_size=5)
    assert [num_token_rows(shape, tensor, rank) for rank in range(tensor)] == rows


@dataclass(frozen=True)
class Trained:
    """The observations of a rank in a run."""

    numbers: list[tuple[float, float]]
    """loss and norm of the gradient of each step"""
    padding: list[float]
    """the largest weight of a row of padding after the load, after each step its largest gradient,
    and at the end its largest weight"""
    logits: np.ndarray
    """of one sequence at the end: this rank's part"""
    answer: list[int]


def train(layout: Layout, rank: int, meeting: Path, hf: str, load: str, save: str) -> Trained:
    """Train the steps that are left from a checkpoint on; save after two."""
    from miles.train.model.device_batch import send
    from miles.train.model.packed_forward import forward_packed, single_sequence
    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.trainer import Trainer

    start(layout, rank, meeting)
    shape = read_shape(hf)
    trainer = Trainer(trainer_settings(shape, layout), rank)
    found = checkpoint_folder.find(load)
    assert found is not None
    checkpoint_load.load(trainer, found, model_only=found.extra is None)

    num_rows = num_token_rows(shape, layout.tensor, rank)
    weights = [trainer.gpt.embedding.word_embeddings.weight, trainer.gpt.output_layer.weight]
    numbers = []
    padding = [largest(weight[num_rows:] for weight in weights)]
    for step in range(found.iteration, NUM_STEPS):
        report, micro_batches = batch(step, layout)
        result = trainer.train_step(report, micro_batches[0])
        numbers.append((result.loss, result.grad_norm))
        padding.append(largest(weight.main_grad[num_rows:] for weight in weights))
        if step + 1 == SAVED_STEP:
            checkpoint_writer.save(trainer, save, SAVED_STEP, {"cursor": {}})
    padding.append(largest(weight[num_rows:] for weight in weights))

    with torch.no_grad():
        logits = forward_packed(trainer.gpt, send(single_sequence([5, 6, 7])), with_labels=False)
    (answer,) = trainer.generate([[5, 6, 7]], [], 4)
    return Trained(numbers, padding, logits[0].numpy(), answer)


def largest(tensors: Any) -> float:
    """Return the largest absolute value; 0 where there is none."""
    return max((float(tensor.abs().max()) for tensor in tensors if len(tensor)), default=0.0)


def rows_of(saved: Path) -> tuple[int, int]:
    """Return the rows of a checkpoint's embedding, by its arguments and by its tensor."""
    checkpoint = Checkpoint(saved, str(saved))
    key = "embedding.word_embeddings.weight"
    return checkpoint.args["padded_vocab_size"], checkpoint.tensors[key].size[0]


@pytest.mark.slow
def test_an_uneven_vocabulary_trains_alike(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", "qwen3", tied=False, vocab_size=NUM_STORED_ROWS)
    hf_to_megatron(str(hf), str(tmp_path / "megatron"))
    edit_config(hf, vocab_size=NUM_TOKENS)
    (hf / "model.safetensors").unlink()

    runs = {}
    for name, layout in (("one", ONE), ("two", TWO)):
        arguments = (str(hf), str(tmp_path / "megatron"), str(tmp_path / name))
        runs[name] = run_ranks(train, layout, *arguments)
    (one,) = runs["one"]
    two = runs["two"]
    np.testing.assert_allclose(two[0].numbers, one.numbers, rtol=2e-5)
    assert two[1].padding == [0.0] * (NUM_STEPS + 2)

    # The row of padding is no token's, also where an answer is looked for.
    logits = np.concatenate([rank.logits for rank in two], axis=1)
    assert logits.shape[1] == NUM_TOKENS + 1
    assert (logits[:, NUM_TOKENS] == np.finfo(np.float32).min).all()
    np.testing.assert_allclose(logits[:, :NUM_TOKENS], one.logits, rtol=1e-3, atol=1e-4)
    assert two[0].answer == two[1].answer == one.answer

    # Each continues the checkpoint of the other.
    assert rows_of(tmp_path / "one/iter_0000002") == (NUM_TOKENS, NUM_TOKENS)
    assert rows_of(tmp_path / "two/iter_0000002") == (NUM_TOKENS + 1, NUM_TOKENS + 1)
    for name, layout in (("two", ONE), ("one", TWO)):
        arguments = (str(hf), str(tmp_path / name), "")
        resumed = run_ranks(train, layout, *arguments)[-1]
        np.testing.assert_allclose(resumed.numbers, one.numbers[SAVED_STEP:], rtol=2e-5)
        assert resumed.padding == [0.0] * (NUM_STEPS - SAVED_STEP + 2)

    export = megatron_to_hf(str(tmp_path / "two"), str(hf), str(tmp_path / "export"))
    with safe_open(f"{export}/model.safetensors", "pt") as tensors:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert tensors.get_slice(name).get_shape()[0] == NUM_TOKENS
