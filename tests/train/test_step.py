"""The step's mathematics, on real Megatron: packing changes nothing, ranks change nothing, checkpoints neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.data.pack import micro_batch
from miles.train.topology import Layout
from tests.train.ranks import SHAPE, batch, free_address, make_trainer, run_ranks


@pytest.fixture(scope="module")
def trainer() -> Any:
    from miles.train import topology

    yield make_trainer(Layout(1), 0, free_address())
    topology.shutdown()


def token_losses(trainer: Any, samples: list[np.ndarray]) -> list[np.ndarray]:
    """Losses of each sample's labels, from one micro-batch."""
    from miles.train.model import forward_packed

    lengths = [len(sample) for sample in samples]
    ids = np.concatenate(samples).astype(np.int32)
    one = micro_batch(
        ids, np.ones_like(ids, np.uint8), np.array(lengths), np.arange(len(samples)), np.zeros(len(samples))
    )
    with torch.no_grad():
        losses = forward_packed(trainer.gpt, one, labels=True)[0].numpy()
    ends = np.cumsum(lengths)
    return [losses[end - length : end - 1] for end, length in zip(ends, lengths, strict=True)]


def samples() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, SHAPE.vocab_size, length) for length in (11, 40, 2, 23)]


def test_a_sample_has_the_same_loss_packed_and_alone(trainer: Any) -> None:
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


def test_packed_attention_is_masked_attention() -> None:
    from types import SimpleNamespace

    from miles.train.attention import PackedAttention

    torch.manual_seed(0)
    config: Any = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=8)
    query, key, value = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 4, 9]), max_seqlen_q=5)
    out = PackedAttention(config, 1, None, "self")(query, key, value, packed_seq_params=packed)
    segment = torch.tensor([0] * 4 + [1] * 5)
    allowed = (segment[:, None] == segment) & torch.ones(9, 9, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1)).reshape(9, -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def losses_of(layout: Layout, rank: int, init_method: str, max_tokens: int, weights: str) -> list[tuple[float, ...]]:
    """Three steps: loss, gradient norm and per-source losses of each.

    The first to come leaves its weights, the others start from them: pipeline stages draw their own at random.
    """
    from miles.train import checkpoint

    trainer = make_trainer(layout, rank, init_method)
    found = checkpoint.find(weights)
    if found is None:
        checkpoint.save(trainer, weights, 0, {}, model_only=True)
    else:
        checkpoint.load(trainer, found, model_only=True)
    results = []
    for step in range(3):
        report, ranks = batch(step, layout, max_tokens=max_tokens)
        result = trainer.train_step(report, ranks[layout.data_rank(rank)])
        assert result.num_tokens == report.num_trained_tokens
        results.append((result.loss, result.grad_norm, *result.source_losses))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "max_tokens"),
    [(Layout(1), 40), (Layout(2), 64), (Layout(2, tensor=2), 64), (Layout(2, pipeline=2), 64)],
    ids=["small micro-batches", "dp2", "tp2", "pp2"],
)
def test_the_loss_is_a_global_sum_over_a_global_count(
    layout: Layout, max_tokens: int, reference: tuple[str, list[tuple[float, ...]]]
) -> None:
    weights, losses = reference
    for got in run_ranks(losses_of, layout, max_tokens, weights):
        np.testing.assert_allclose(got, losses, rtol=1e-4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[float, ...]]]:
    """The starting weights, and the losses of one rank with one micro-batch a step."""
    weights = str(tmp_path_factory.mktemp("weights"))
    (losses,) = run_ranks(losses_of, Layout(1), 4096, weights)
    assert losses[2][0] < losses[0][0]
    return weights, losses


def test_the_loss_is_the_hand_computed_mean(trainer: Any) -> None:
    report, (mine,) = batch(0, Layout(1), max_tokens=48)
    from miles.train.model import forward_packed

    total = 0.0
    with torch.no_grad():
        for one in mine:
            total += float((forward_packed(trainer.gpt, one, labels=True)[0] * torch.from_numpy(one.loss_mask)).sum())
    sums = trainer.evaluate(mine)
    assert len(mine) > 2
    assert sum(sums.losses) / sum(sums.tokens) == pytest.approx(total / report.num_trained_tokens, rel=1e-6)
    assert sum(sums.tokens) == report.num_trained_tokens


def test_a_step_without_trained_tokens_changes_no_weight(trainer: Any) -> None:
    report, (mine,) = batch(0, Layout(1))
    silent = [type(one)(**{**vars(one), "loss_mask": one.loss_mask * 0}) for one in mine]
    before = [parameter.detach().clone() for parameter in trainer.gpt.parameters()]
    result = trainer.train_step(type(report)(**{**vars(report), "num_trained_tokens": 0}), silent)
    assert result.skipped
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.gpt.parameters(), strict=True))


def interrupted(layout: Layout, rank: int, init_method: str, folder: str, resume: bool) -> list[float]:
    """Steps 0..4 with a checkpoint after 2; or steps 2..4 from it."""
    from miles.train import checkpoint

    trainer = make_trainer(layout, rank, init_method)
    first = 0
    if resume:
        found = checkpoint.find(folder)
        assert found is not None
        assert found.iteration == 2
        assert found.extra == {"cursor": {"consumed_rows": 14}}
        checkpoint.load(trainer, found, model_only=False)
        first = 2
    losses = []
    for step in range(first, 5):
        report, ranks = batch(step, layout)
        result = trainer.train_step(report, ranks[layout.data_rank(rank)])
        losses.append((result.loss, result.grad_norm, result.lr))
        if step == 1:
            checkpoint.save(trainer, folder, 2, {"cursor": {"consumed_rows": 14}})
    return losses


@pytest.mark.slow
def test_a_checkpoint_goes_on_where_it_was_also_at_another_layout(tmp_path: Path) -> None:
    folder = str(tmp_path / "save")
    unbroken = run_ranks(interrupted, Layout(2), folder, False)[0]
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text() == "2"
    for layout in (Layout(2), Layout(1)):
        resumed = run_ranks(interrupted, layout, folder, True)[0]
        np.testing.assert_allclose(resumed, unbroken[2:], rtol=1e-4)


def test_the_cpu_layer_refuses_to_hide_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from miles.train import cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is available"):
        cpu.activate()
