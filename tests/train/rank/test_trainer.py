"""A training step on real Megatron: packing, ranks and checkpoints change nothing."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from miles.data.packing.micro_batch import micro_batch
from miles.data.types import DUMMY_ROW_ID, MicroBatch
from miles.errors import CheckpointError
from miles.train.parallel_layout import Layout
from miles.train.recompute_config import KEEP_ALL, RecomputeConfig
from tests.support.fault_table import NOTHING, observed
from tests.support.pickles import ShellCommand
from tests.support.ranks import (
    NUM_SOURCES,
    SHAPE,
    batch,
    make_trainer,
    run_ranks,
    trainer_settings,
)

POISON = 391
"""A token of the first step's made-up samples."""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from miles.train.model import process_groups

    yield make_trainer(Layout(1), 0, tmp_path_factory.mktemp("ranks") / "meeting")
    process_groups.shutdown()


def samples() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, SHAPE.vocab_size, length) for length in (11, 40, 2, 23)]


def token_losses(trainer: Any, samples: list[np.ndarray]) -> list[np.ndarray]:
    """Return the losses of each sample's labels, from one micro-batch of all samples."""
    from miles.train.model.device_batch import send
    from miles.train.model.packed_forward import forward_packed

    lengths = [len(sample) for sample in samples]
    ids = np.concatenate(samples).astype(np.int32)
    packed = micro_batch(
        ids,
        np.ones_like(ids, np.uint8),
        np.array(lengths),
        np.arange(len(samples)),
        np.zeros(len(samples)),
    )
    with torch.no_grad():
        losses = forward_packed(trainer.gpt, send(packed), with_labels=True).of_tokens.numpy()

    # The last token of a sample has no label.
    return np.split(losses, np.cumsum([length - 1 for length in lengths])[:-1])


def copy_weights(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.gpt.parameters()]


def has_weights(trainer: Any, weights: list[torch.Tensor]) -> bool:
    pairs = zip(weights, trainer.gpt.parameters(), strict=True)
    return all(torch.equal(old, new) for old, new in pairs)


def test_packing_keeps_the_loss_of_a_sample(trainer: Any) -> None:
    together = token_losses(trainer, samples())
    for sample, packed in zip(samples(), together, strict=True):
        (alone,) = token_losses(trainer, [sample])
        np.testing.assert_allclose(packed, alone, rtol=0, atol=2e-6)


def test_a_segment_sees_nothing_of_its_neighbours(trainer: Any) -> None:
    before = token_losses(trainer, samples())
    changed = samples()
    changed[1] = (changed[1] + 1) % SHAPE.vocab_size
    after = token_losses(trainer, changed)

    for index in (0, 2, 3):
        np.testing.assert_array_equal(before[index], after[index])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_the_loss_is_the_hand_computed_mean(trainer: Any) -> None:
    from miles.train.model.device_batch import send
    from miles.train.model.packed_forward import forward_packed

    report, (micro_batches,) = batch(0, Layout(1), max_tokens=48)
    assert len(micro_batches) > 2

    total = 0.0
    with torch.no_grad():
        for packed in micro_batches:
            losses = forward_packed(trainer.gpt, send(packed), with_labels=True)
            total += float(losses.of_tokens.sum())
    expected = total / report.content.num_trained_tokens

    sums = trainer.evaluate([micro_batches[:1], micro_batches[1:]], NUM_SOURCES)
    assert sum(sums.losses) / sum(sums.tokens) == pytest.approx(expected, rel=1e-6)
    assert sum(sums.tokens) == report.content.num_trained_tokens


def test_an_untrained_step_changes_no_weight(trainer: Any) -> None:
    report, (micro_batches,) = batch(0, Layout(1))
    untrained = [replace(packed, loss_mask=packed.loss_mask * 0) for packed in micro_batches]
    before = copy_weights(trainer)

    content = replace(report.content, num_trained_tokens=0)
    result = trainer.train_step(replace(report, content=content), untrained)

    assert result.skip
    assert result.skip.row_ids == ()
    assert has_weights(trainer, before)


def test_answers_are_the_most_likely_tokens(trainer: Any) -> None:
    prompts = [[1, 2, 3], [5, 6, 7, 8]]
    answers: list[list[int]] = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(trainer.logits(ids)[-1].argmax()))
        answers.append(ids[len(prompt) :])
    assert trainer.generate(prompts, [], 6) == answers

    stop = answers[0][2]
    stopped = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in answers]
    assert trainer.generate(prompts, [stop], 6) == stopped


def trained_step(trainer: Any, layout: Layout, rank: int) -> Any:
    """Return the result of the first step."""
    report, ranks = batch(0, layout, max_tokens=64)
    return trainer.train_step(report, ranks[layout.data_rank(rank)])


def step_with_infinite_loss(layout: Layout, rank: int, meeting: Path) -> tuple[Any, ...]:
    """Train a step in which the loss of all rows that hold `POISON` is not finite."""
    trainer = make_trainer(layout, rank, meeting)

    def poison(module: Any, arguments: Any, keywords: Any, output: Any) -> Any:
        is_poison = (keywords["input_ids"] == POISON).T[:, :, None]
        return output.masked_fill(is_poison, float("inf"))

    if hasattr(trainer.gpt, "embedding"):  # on the first pipeline stage
        trainer.gpt.embedding.register_forward_hook(poison, with_kwargs=True)
    result = trained_step(trainer, layout, rank)
    return result.skip.reason, result.skip.row_ids


def step_with_infinite_gradient(layout: Layout, rank: int, meeting: Path) -> tuple[Any, ...]:
    """Train a step in which only the gradient is not finite; then a good one."""
    trainer = make_trainer(layout, rank, meeting)
    before = copy_weights(trainer)

    first = next(iter(trainer.gpt.parameters()))
    hook = first.register_hook(lambda gradient: gradient * float("inf"))
    result = trained_step(trainer, layout, rank)
    hook.remove()
    assert has_weights(trainer, before)

    again = trained_step(trainer, layout, rank)
    assert not again.skip
    assert np.isfinite(again.grad_norm)
    return result.skip.reason, result.skip.row_ids


def step_with_broken_weight(layout: Layout, rank: int, meeting: Path) -> tuple[Any, ...]:
    """Train a step with a NaN in a weight of the first rank."""
    trainer = make_trainer(layout, rank, meeting)
    if rank == 0:
        break_key(trainer)
    result = trained_step(trainer, layout, rank)
    return result.skip.reason, result.skip.row_ids, result.skip.weights


def break_key(trainer: Any) -> None:
    """Put NaN into two values of a key's projection, beside queries and values in one tensor."""
    query = SHAPE.kv_channels * SHAPE.num_attention_heads // SHAPE.num_query_groups
    layer = trainer.gpt.decoder.layers[0]
    with torch.no_grad():
        layer.self_attention.linear_qkv.weight[query, :2] = float("nan")


BROKEN_KEY = "model.layers.0.self_attn.k_proj.weight (2 values)"


def rows_with_poison(batches: Sequence[MicroBatch]) -> list[int]:
    """Return the ids of the rows that hold `POISON` before a trained token."""
    rows = []
    for packed in batches:
        segments = zip(packed.row_ids, packed.cu_seqlens, packed.cu_seqlens[1:], strict=False)
        for row, begin, end in segments:
            is_poisoned = POISON in packed.input_ids[begin:end][:-1]
            if is_poisoned and packed.loss_mask[begin:end].any():
                rows.append(int(row))
    return sorted(rows)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(2), Layout(2, pipeline=2)], ids=["dp2", "pp2"])
def test_a_skipped_step_names_its_rows(layout: Layout) -> None:
    _, ranks = batch(0, layout, max_tokens=64)
    batches = list(chain.from_iterable(ranks))
    poisoned = rows_with_poison(batches)
    every_row = np.concatenate([packed.row_ids for packed in batches])
    every_row = sorted(every_row[every_row != DUMMY_ROW_ID].tolist())
    assert 0 < len(poisoned) < len(every_row)

    *_, last_rank = run_ranks(step_with_infinite_loss, layout)
    assert last_rank == ("the loss is not finite", tuple(poisoned))
    *_, last_rank = run_ranks(step_with_infinite_gradient, layout)
    assert last_rank == ("the gradient is not finite", tuple(every_row))
    *_, last_rank = run_ranks(step_with_broken_weight, layout)
    assert last_rank == ("the loss is not finite", (), (BROKEN_KEY,))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Megatron's views of the weights
@pytest.mark.parametrize(
    ("recompute", "num_calls"),
    [(KEEP_ALL, 2), (RecomputeConfig("selective"), 4), (RecomputeConfig("full", "uniform", 1), 4)],
)
def test_attention_is_recomputed_if_asked(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, recompute: RecomputeConfig, num_calls: int
) -> None:
    """Each of two layers runs attention once, and once more in the backward pass."""
    from miles.train.model.attention import PackedAttention
    from miles.train.rank.trainer import Trainer

    calls = []
    forward = PackedAttention.forward

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return forward(*arguments, **keywords)

    recomputing = Trainer(trainer_settings(SHAPE, Layout(1), recompute=recompute), 0)
    monkeypatch.setattr(PackedAttention, "forward", counted)
    report, (micro_batches,) = batch(0, Layout(1), max_tokens=4096)
    recomputing.train_step(report, micro_batches)
    assert len(calls) == num_calls


def train_with_checkpoint(
    layout: Layout, rank: int, meeting: Path, folder: str, resume: bool
) -> list[tuple[float, float, float]]:
    """Train steps 0 to 4 with a checkpoint after two; or resume from it and train steps 2 to 4.

    Returns:
        loss, gradient's norm and learning rate of each step.
    """
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer

    trainer = make_trainer(layout, rank, meeting)
    first = 0
    if resume:
        found = checkpoint_folder.find(folder)
        assert found is not None
        assert found.iteration == 2
        assert found.extra == {"cursor": {"consumed_rows": 14}}
        checkpoint_load.load(trainer, found, model_only=False)
        first = 2

    numbers = []
    for step in range(first, 5):
        report, ranks = batch(step, layout)
        result = trainer.train_step(report, ranks[layout.data_rank(rank)])
        numbers.append((result.loss, result.grad_norm, result.lr))
        if step == 1:
            checkpoint_writer.save(trainer, folder, 2, {"cursor": {"consumed_rows": 14}})
    return numbers


@pytest.mark.slow
def test_training_resumes_at_any_layout(tmp_path: Path) -> None:
    folder = str(tmp_path / "save")
    unbroken = run_ranks(train_with_checkpoint, Layout(2), folder, False)[0]
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text() == "2"

    for layout in (Layout(2), Layout(1)):
        resumed = run_ranks(train_with_checkpoint, layout, folder, True)[0]
        np.testing.assert_allclose(resumed, unbroken[2:], rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # Megatron loads by names that torch wants to retire
def test_a_run_that_continues_has_the_rates_of_its_line(trainer: Any, tmp_path: Path) -> None:
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.trainer import Trainer

    checkpoint_writer.save(trainer, str(tmp_path), 1, {})
    settings = trainer_settings(SHAPE, Layout(1))
    changed = replace(settings.optimizer, lr=3e-3, min_lr=1e-3)
    continued = Trainer(replace(settings, optimizer=changed), 0)
    found = checkpoint_folder.find(str(tmp_path))
    assert found is not None
    checkpoint_load.load(continued, found, model_only=False)

    groups = continued.optimizer.param_groups
    assert [(group["max_lr"], group["min_lr"]) for group in groups] == [(3e-3, 1e-3)] * len(groups)
    continued.scheduler.step(1)
    assert groups[0]["lr"] <= 3e-3


def test_no_pickle_of_a_checkpoint_runs_in_a_rank(trainer: Any, tmp_path: Path) -> None:
    """Neither its common part, nor an object among its boxes, which torch loads without limits."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer

    attack = ShellCommand(f"touch {tmp_path}/ran")
    content = io.BytesIO()
    torch.save(attack, content)
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="x"))
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        planner.load_bytes(item, io.BytesIO(content.getvalue()))

    checkpoint_writer.save(trainer, str(tmp_path), 1, {})
    found = checkpoint_folder.find(str(tmp_path))
    assert found is not None
    torch.save({"args": attack}, Path(found.url, "common.pt"))
    with pytest.raises(CheckpointError, match=r"common part \(common\.pt\) cannot be read"):
        checkpoint_load.load(trainer, found, model_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")  # Megatron loads by names that torch wants to retire
def test_a_checkpoint_without_its_files_is_refused(trainer: Any, tmp_path: Path) -> None:
    """torch's exception is no `Exception`: it ended the rank as a mistake of ours."""
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer

    cursor = {"cursor": {"consumed_rows": 0}}
    for iteration in (1, 2):
        checkpoint_writer.save(trainer, str(tmp_path), iteration, cursor)
    found = checkpoint_folder.find(str(tmp_path))
    assert found is not None
    for file in (tmp_path / "iter_0000002").glob("*.distcp"):
        file.unlink()  # after the driver has seen them all

    with pytest.raises(
        CheckpointError, match=r"iter_0000002: cannot be read \(.*distcp"
    ) as refused:
        checkpoint_load.load(trainer, found, model_only=True)
    assert "The checkpoint of step 1 is whole" in str(refused.value)


def test_weights_that_are_not_finite_are_not_loaded(trainer: Any, tmp_path: Path) -> None:
    """Named as Hugging Face names them; after the weights, the optimizer's state is looked at."""
    from miles.common import checkpoint_folder
    from miles.train.rank import checkpoint_load, checkpoint_writer
    from miles.train.rank.trainer import Trainer

    def load(iteration: int, **more: Any) -> None:
        checkpoint_writer.save(broken, str(tmp_path / "run"), iteration, {})
        found = checkpoint_folder.find(str(tmp_path / "run"))
        assert found is not None
        checkpoint_load.load(trainer, found, **more)

    before = copy_weights(trainer)
    broken = Trainer(trainer_settings(SHAPE, Layout(1)), 0)
    trained_step(broken, Layout(1), 0)
    for state in broken.optimizer.chained_optimizers[0].optimizer.state.values():
        state["exp_avg"].view(-1)[0] = float("inf")
    load(1, model_only=True)
    with pytest.raises(CheckpointError, match="iter_0000002: the state of the optimizer: not fin"):
        load(2, model_only=False)

    break_key(broken)
    with pytest.raises(CheckpointError) as refused:
        load(3, model_only=True)
    assert f"{tmp_path}/run/iter_0000003: {BROKEN_KEY}: not finite" in str(refused.value)
    observed("NaN in a weight of the checkpoint", str(refused.value), "not finite", NOTHING)
    with torch.no_grad():
        for parameter, weight in zip(trainer.gpt.parameters(), before, strict=True):
            parameter.copy_(weight)
