"""The step's mathematics, on real Megatron: packing changes nothing, ranks change nothing, checkpoints neither."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.data.packing.pack import micro_batch
from miles.train.config import KEEP_ALL, RecomputeConfig
from miles.train.model.build import padded
from miles.train.model.loss import masked_sum, rows_not_finite
from miles.train.parallel_layout import Layout
from tests.support.ranks import (
    NUM_SOURCES,
    NUM_STEPS,
    SETTINGS,
    SHAPE,
    batch,
    make_trainer,
    run_ranks,
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from miles.train.model import process_groups

    yield make_trainer(Layout(1), 0, tmp_path_factory.mktemp("ranks") / "meeting")
    process_groups.shutdown()


def token_losses(trainer: Any, samples: list[np.ndarray]) -> list[np.ndarray]:
    """Losses of each sample's labels, from one micro-batch."""
    from miles.train.model.build import forward_packed

    lengths = [len(sample) for sample in samples]
    ids = np.concatenate(samples).astype(np.int32)
    one = micro_batch(
        ids,
        np.ones_like(ids, np.uint8),
        np.array(lengths),
        np.arange(len(samples)),
        np.zeros(len(samples)),
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

    from miles.train.model.attention import PackedAttention

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


def test_the_loss_is_the_hand_computed_mean(trainer: Any) -> None:
    report, (mine,) = batch(0, Layout(1), max_tokens=48)
    from miles.train.model.build import forward_packed

    total = 0.0
    with torch.no_grad():
        for one in mine:
            total += float(
                (
                    forward_packed(trainer.gpt, one, labels=True)[0]
                    * torch.from_numpy(one.loss_mask)
                ).sum()
            )
    sums = trainer.evaluate([mine[:1], mine[1:]], NUM_SOURCES)
    assert len(mine) > 2
    assert sum(sums.losses) / sum(sums.tokens) == pytest.approx(
        total / report.content.num_trained_tokens, rel=1e-6
    )
    assert sum(sums.tokens) == report.content.num_trained_tokens


def test_a_step_without_trained_tokens_changes_no_weight(trainer: Any) -> None:
    report, (mine,) = batch(0, Layout(1))
    silent = [type(one)(**{**vars(one), "loss_mask": one.loss_mask * 0}) for one in mine]
    before = [parameter.detach().clone() for parameter in trainer.gpt.parameters()]
    content = replace(report.content, num_trained_tokens=0)
    result = trainer.train_step(replace(report, content=content), silent)
    assert result.skipped
    assert all(
        torch.equal(old, new) for old, new in zip(before, trainer.gpt.parameters(), strict=True)
    )


def test_answers_are_the_most_likely_tokens(trainer: Any) -> None:
    prompts, answers = [[1, 2, 3], [5, 6, 7, 8]], list[list[int]]()
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(trainer.logits(ids)[-1].argmax()))
        answers.append(ids[len(prompt) :])
    assert trainer.generate(prompts, [], 6) == answers
    stop = answers[0][2]
    ends = [answer.index(stop) + 1 if stop in answer else 6 for answer in answers]
    assert trainer.generate(prompts, [stop], 6) == [
        answer[:end] for answer, end in zip(answers, ends, strict=True)
    ]


def test_a_loss_that_is_not_trained_may_be_nan() -> None:
    _, (mine,) = batch(0, Layout(1), max_tokens=4096)
    losses = torch.where(torch.from_numpy(mine[0].loss_mask) > 0, 2.0, float("nan"))[
        None
    ].requires_grad_()
    total, count, by_segment = masked_sum(losses, mine[0])
    total.backward()
    assert total.item() == 2 * count.item() == 2 * mine[0].loss_mask.sum()
    assert rows_not_finite(by_segment, mine[0]) == []
    assert losses.grad is not None
    assert losses.grad[0].tolist() == mine[0].loss_mask.tolist()


def broken(layout: Layout, rank: int, meeting: Path, what: str) -> tuple[Any, ...]:
    """A step that goes wrong: in the loss of the rows that hold a token, or in the gradient alone; then a good one."""
    from miles.train.rank.trainer import Trainer

    trainer: Trainer = make_trainer(layout, rank, meeting)
    report, ranks = batch(0, layout, max_tokens=64)
    mine = ranks[layout.data_rank(rank)]
    before = [parameter.detach().clone() for parameter in trainer.gpt.parameters()]
    hook = None
    if what == "loss":
        if hasattr(trainer.gpt, "embedding"):  # the first stage's

            def poison(module: Any, arguments: Any, keywords: Any, output: Any) -> Any:
                return output.masked_fill(
                    (keywords["input_ids"] == POISON).T[:, :, None], float("inf")
                )

            trainer.gpt.embedding.register_forward_hook(poison, with_kwargs=True)
    else:
        first = next(iter(trainer.gpt.parameters()))
        hook = first.register_hook(lambda gradient: gradient * float("inf"))
    result = trainer.train_step(report, mine)
    if hook is not None:
        hook.remove()
        assert all(
            torch.equal(old, new) for old, new in zip(before, trainer.gpt.parameters(), strict=True)
        )
        again = trainer.train_step(report, mine)
        assert not again.skipped
        assert np.isfinite(again.grad_norm)
    return result.skipped, result.skipped_rows, result.lr, result.num_tokens


POISON = 391
"""A token of the first step's made-up samples."""


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(2), Layout(2, pipeline=2)], ids=["dp2", "pp2"])
def test_a_step_that_is_not_finite_is_skipped_and_its_rows_are_named(layout: Layout) -> None:
    _, ranks = batch(0, layout, max_tokens=64)
    batches = [one for rank in ranks for one in rank]
    poisoned = sorted(
        int(row)
        for one in batches
        for row, begin, end in zip(one.row_ids, one.cu_seqlens, one.cu_seqlens[1:], strict=False)
        if POISON in one.input_ids[begin:end][:-1] and one.loss_mask[begin:end].any()
    )
    every = sorted(int(row) for one in batches for row in one.row_ids if row >= 0)
    assert 0 < len(poisoned) < len(every)
    *_, last = run_ranks(broken, layout, "loss")
    assert last[:2] == ("the loss is not finite", tuple(poisoned))
    *_, last = run_ranks(broken, layout, "gradient")
    assert last[:2] == ("the gradient is not finite", tuple(every))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Megatron's views of the weights
@pytest.mark.parametrize(
    ("recompute", "calls"),
    [(KEEP_ALL, 2), (RecomputeConfig("selective"), 4), (RecomputeConfig("full", "uniform", 1), 4)],
)
def test_what_is_to_be_recomputed_is(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, recompute: RecomputeConfig, calls: int
) -> None:
    from miles.train.model.attention import PackedAttention
    from miles.train.rank.trainer import Trainer

    other = Trainer(
        SHAPE, Layout(1), 0, SETTINGS, NUM_STEPS, NUM_SOURCES, bf16=False, recompute=recompute
    )
    made = []
    forward = PackedAttention.forward
    monkeypatch.setattr(
        PackedAttention, "forward", lambda *words, **more: made.append(1) or forward(*words, **more)
    )
    report, (mine,) = batch(0, Layout(1), max_tokens=4096)
    other.train_step(report, mine)
    assert len(made) == calls, (
        "once a layer, of which there are two, and once more in the backward pass"
    )


def test_padding_trains_nothing_and_stands_behind() -> None:
    _, (mine,) = batch(0, Layout(1), max_tokens=64)
    layout = Layout(16, tensor=16, sequence_parallel=True)
    for one in mine:
        made = padded(one, layout)
        assert len(made.input_ids) % 16 == 0
        assert (
            made.cu_seqlens[-1] == len(made.input_ids) == len(made.labels) == len(made.position_ids)
        )
        assert made.loss_mask.sum() == one.loss_mask.sum()
        assert made.input_ids[: len(one.input_ids)].tolist() == one.input_ids.tolist()
        assert len(made.row_ids) == len(made.source_ids) == len(made.cu_seqlens) - 1
    assert padded(mine[0], Layout(16, tensor=16)) is mine[0]


def interrupted(layout: Layout, rank: int, meeting: Path, folder: str, resume: bool) -> list[float]:
    """Steps 0..4 with a checkpoint after 2; or steps 2..4 from it."""
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
    losses = []
    for step in range(first, 5):
        report, ranks = batch(step, layout)
        result = trainer.train_step(report, ranks[layout.data_rank(rank)])
        losses.append((result.loss, result.grad_norm, result.lr))
        if step == 1:
            checkpoint_writer.save(trainer, folder, 2, {"cursor": {"consumed_rows": 14}})
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
    from miles.train.model import megatron_on_cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is available"):
        megatron_on_cpu.activate()
