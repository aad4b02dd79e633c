"""Token ids of prompts -> token ids of answers, step by step, by a model of transformers.

    prompts [[5, 1, 7], [9]]   padded on the left, forward pass, keys and values kept
    step 0  {0: 12, 1: 3}      the next token of each row
    step 1  {0: 2,  1: 8}      row 0 has written the terminator, and leaves the batch
    step 2  {1: 2}

Greedy answers do not depend on the batch. Sums of floating-point numbers do: in a batch they are
added in another order, and padding adds zeros. Where the two most likely tokens are nearer to one
another than such a difference, the row is computed once more, alone and as a whole, and that
decides. So each row gets the answer that it would get by itself: in float32; in the formats of two
bytes nearly always (docs/decisions/059).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from miles.chat.sampling import drawn, draws_of
from miles.chat.settings import Sampling
from miles.errors import DataError

_ROUNDINGS = {torch.float32: 64}
_FEW_ROUNDINGS = 2
"""The other formats have roundings so large that most tokens would be computed twice.

Logits of which one is not larger by this many roundings of their size are computed alone."""


class Decoder:
    """A model that continues prompts.

    Args:
        model: of transformers, in evaluation mode.
        terminator_ids: tokens that end an answer, one after another.
        max_tokens: of a prompt with its answer, by the model's position embeddings.
    """

    def __init__(self, model: Any, terminator_ids: Sequence[int], max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._model = model
        self._terminator = list(terminator_ids)

    def steps(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]
    ) -> Iterator[dict[int, int]]:
        """Yield the next token of each prompt that is not answered yet, step by step.

        A terminator is yielded, too; it is the last of its answer.

        Args:
            prompts: token ids, none empty and none of `max_tokens` or more.
            rows: the number of each prompt, with which the seed decides its draws.

        Raises:
            DataError: the model gives numbers that are not finite.
        """
        draws = [draws_of(sampling.seed, row) for row in rows]
        sequences = [list(prompt) for prompt in prompts]
        alive = list(range(len(prompts)))
        batch = _Batch(self._model, prompts)

        for _ in range(sampling.max_new_tokens):
            logits = batch.next_logits()
            if not bool(torch.isfinite(logits).all()):
                raise DataError(
                    "the model gives numbers that are not finite (NaN or infinity): its weights "
                    "are broken, or it diverged; try an earlier checkpoint with --ckpt-step"
                )
            if sampling.is_greedy:
                tokens = self._most_likely(logits, [sequences[number] for number in alive])
            else:
                tokens = [
                    drawn(row, sampling, draws[number].random())
                    for number, row in zip(alive, logits, strict=True)
                ]
            step = dict(zip(alive, tokens, strict=True))
            for number, token in step.items():
                sequences[number].append(token)
            yield step

            kept = [
                place for place, number in enumerate(alive) if not self._is_over(sequences[number])
            ]
            if not kept:
                return
            alive = [alive[place] for place in kept]
            batch.go_on([tokens[place] for place in kept], kept)

    def ends(self, answer: Sequence[int]) -> bool:
        """Return whether an answer ends with the terminator."""
        num_last = len(self._terminator)
        return list(answer[-num_last:]) == self._terminator

    @property
    def num_terminator_tokens(self) -> int:
        return len(self._terminator)

    def _is_over(self, sequence: Sequence[int]) -> bool:
        return self.ends(sequence) or len(sequence) >= self.max_tokens

    def _most_likely(self, logits: Tensor, sequences: Sequence[Sequence[int]]) -> list[int]:
        """Return the most likely token of each row; of equals, the lowest."""
        best = logits.topk(2, dim=-1).values
        size = logits.abs().amax(dim=-1).clamp(min=1.0)
        dtype = self._model.dtype
        margin = _ROUNDINGS.get(dtype, _FEW_ROUNDINGS) * torch.finfo(dtype).eps * size
        is_close = (best[:, 0] - best[:, 1] <= margin).tolist()

        tokens: list[int] = logits.argmax(dim=-1).tolist()
        for place, sequence in enumerate(sequences):
            if is_close[place]:
                tokens[place] = int(_Batch(self._model, [sequence]).next_logits()[0].argmax())
        return tokens


class _Batch:
    """Sequences of a batch, padded on the left, and the keys and values of what is computed."""

    def __init__(self, model: Any, sequences: Sequence[Sequence[int]]) -> None:
        self._model = model
        device = model.device
        longest = max(map(len, sequences))
        self._ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        self._mask = torch.zeros_like(self._ids)
        for row, sequence in enumerate(sequences):
            begin = longest - len(sequence)
            self._ids[row, begin:] = torch.tensor(list(sequence))
            self._mask[row, begin:] = 1
        self._ids, self._mask = self._ids.to(device), self._mask.to(device)
        self._positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        self._cache: Any = None

    def next_logits(self) -> Tensor:
        """Return float32 [rows, vocabulary]: of the token behind each sequence."""
        with torch.inference_mode():
            output = self._model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = output.past_key_values
        return output.logits[:, -1].float()

    def go_on(self, tokens: Sequence[int], kept: Sequence[int]) -> None:
        """Append a token to some of the sequences; leave the others out.

        Args:
            tokens: of those that are kept.
            kept: their rows in this batch.
        """
        device = self._ids.device
        if len(kept) < len(self._ids):
            places = torch.tensor(kept, device=device)
            self._cache.batch_select_indices(places)
            self._mask = self._mask[places]
            self._positions = self._positions[places]
        self._ids = torch.tensor(tokens, device=device)[:, None]
        one = torch.ones_like(self._mask[:, :1])
        self._mask = torch.cat([self._mask, one], dim=-1)
        self._positions = self._positions[:, -1:] + 1
