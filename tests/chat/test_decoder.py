"""Answers by a small model: greedy ones as transformers has them, and as for any batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from miles.chat.decoder import Decoder
from miles.chat.sampling import drawn
from miles.chat.settings import Sampling
from miles.errors import ConfigError, DataError

NEVER = (-1,)
"""A terminator that no model writes."""


@pytest.fixture(scope="module")
def model(small_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()


def answers(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    rows: list[int] | None = None,
    terminator: tuple[int, ...] = NEVER,
    max_tokens: int = 4096,
) -> list[list[int]]:
    """Return the answers to prompts that are answered together."""
    decoder = Decoder(model, terminator, max_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    for step in decoder.steps(prompts, sampling, rows or list(range(len(prompts)))):
        for number, token in step.items():
            found[number].append(token)
    return found


def prompts_of(draw: random.Random, count: int) -> list[list[int]]:
    return [[draw.randrange(5, 300) for _ in range(draw.randint(1, 40))] for _ in range(count)]


def test_greedy_answers_are_those_of_transformers(model: Any, draw: random.Random) -> None:
    (prompt,) = prompts_of(draw, 1)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert (
        answers(model, [prompt], Sampling(max_new_tokens=24))[0]
        == expected[0, len(prompt) :].tolist()
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_same_in_any_batch(
    temperature: float, model: Any, draw: random.Random
) -> None:
    prompts = prompts_of(draw, 12)
    sampling = Sampling(temperature, max_new_tokens=16, seed=3)
    alone = [
        answers(model, [prompt], sampling, rows=[row])[0] for row, prompt in enumerate(prompts)
    ]
    assert len(set(map(tuple, alone))) > 6, "prompts that are answered alike tell nothing"
    for batch_size in (2, 5, 12):
        for begin in range(0, len(prompts), batch_size):
            rows = list(range(begin, min(begin + batch_size, len(prompts))))
            batch = answers(model, [prompts[row] for row in rows], sampling, rows)
            assert batch == [alone[row] for row in rows]


def test_a_tie_is_decided_by_the_row_alone(model: Any) -> None:
    """Two tokens have the same logits but for the roundings of a batch, which are made up here."""

    class Noisy:
        """A model of a tie, whose batches round otherwise."""

        device = torch.device("cpu")
        dtype = torch.float32

        def __call__(self, **inputs: Any) -> Any:
            ids = inputs["input_ids"]
            logits = torch.zeros(*ids.shape, 8)
            logits[..., 3] = 5.0
            logits[..., 4] = 5.0 + (1e-6 if len(ids) > 1 else -1e-6)
            cache = type("Cache", (), {"batch_select_indices": lambda *_: None})()
            return type("Output", (), {"logits": logits, "past_key_values": cache})()

    prompts = [[1, 2], [2, 1, 1]]
    assert answers(Noisy(), prompts, Sampling(max_new_tokens=3)) == [[3, 3, 3], [3, 3, 3]]


def test_an_answer_ends_with_all_tokens_of_the_terminator(model: Any, draw: random.Random) -> None:
    prompts = prompts_of(draw, 3)
    free = answers(model, prompts, Sampling(max_new_tokens=20))
    terminator = tuple(free[1][8:10])
    bound = answers(model, prompts, Sampling(max_new_tokens=20), terminator=terminator)
    for answer, whole in zip(bound, free, strict=True):
        ends = [
            end for end in range(2, len(whole) + 1) if tuple(whole[end - 2 : end]) == terminator
        ]
        assert answer == whole[: min(ends, default=20)]
    assert len(bound[1]) <= 10


def test_an_answer_ends_where_the_positions_end(model: Any) -> None:
    assert len(answers(model, [[5, 6, 7]], Sampling(), max_tokens=10)[0]) == 7


def test_draws_follow_the_seed(model: Any) -> None:
    prompt = [[9, 8, 7]]
    first, same, other = (
        answers(model, prompt, Sampling(1.0, seed=seed, max_new_tokens=12)) for seed in (1, 1, 2)
    )
    assert first == same != other


def test_draws_have_the_shares_of_the_softmax(draw: random.Random) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    shares = torch.softmax(logits / 0.5, dim=-1)
    counts = [0] * 4
    for _ in range(4000):
        counts[drawn(logits, Sampling(0.5), draw.random())] += 1
    for count, share in zip(counts, shares.tolist(), strict=True):
        assert abs(count / 4000 - share) < 0.03


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(1.0, top_k=2), {0, 2}),
        (Sampling(1.0, top_p=0.5), {0}),
        (Sampling(1.0, top_p=0.9), {0, 2}),
        (Sampling(1.0, top_p=0.9, top_k=1), {0}),
    ],
)
def test_unlikely_tokens_are_left_out(
    sampling: Sampling, possible: set[int], draw: random.Random
) -> None:
    logits = torch.tensor([0.6, 0.05, 0.3, 0.05]).log()
    assert {drawn(logits, sampling, draw.random()) for _ in range(400)} == possible


def test_a_flag_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="--top-p and --top-k has no effect at --temperature 0"):
        Sampling(top_p=0.9, top_k=5)


def test_numbers_that_are_not_finite_are_named(model: Any) -> None:
    broken = AutoModelForCausalLM.from_config(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(DataError, match="try an earlier checkpoint with --ckpt-step"):
        answers(broken.eval(), [[1]], Sampling())
