"""The least time of a training step on a GPU: its operations and bytes against two ceilings.

    each kernel takes the longer of   operations / what the chip multiplies in a second
                                      bytes / what its memory moves in a second
    a step takes the sum of its kernels

Counted is what the mathematics needs with the kernels of this trainer: products in bfloat16 with
gradients added to float32 sums, attention without scores, the output layer on trained tokens only,
one pass for each norm, rotation and activation, one for Adam. Launches, copies that a better kernel
would not make, and waits are not: they are the distance between this and a measured step.

Data and expert parallelism only. The gradients' exchange is hidden behind the backward pass, that
of the experts' tokens is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from miles.architecture.config import ModelShape
from miles.architecture.sizes import key_size, layer_parameters, query_size, total_parameters
from miles.train.estimate.flops import training_flops
from miles.train.parallel_layout import Layout

_BF16_BYTES = 2
_FLOAT32_BYTES = 4
_ADAM_BYTES = 30
"""Adam for one parameter: reads a gradient, the master weight and two moments, writes the latter
three and the weight in bfloat16."""
_BACKWARD_OF_ATTENTION = 2.5
"""Its products against those of the forward pass: five to two, since the scores are computed again
(Dao et al. 2022, FlashAttention, appendix B)."""
_LOSS_PASSES = 3
"""Passes over the logits in bfloat16, beside the products: reads for the sum, and reads and writes for the
gradient."""


@dataclass(frozen=True)
class Chip:
    """The ceilings of a GPU: what it does in a second."""

    name: str
    peak_flops: float
    """in bfloat16 without sparsity, as the data sheet has it: what the MFU is a share of"""
    product_flops: float
    """of a large matrix product"""
    attention_flops: float
    """of the attention kernel"""
    copy_bytes: float
    """of memory, read and written"""
    link_bytes: float
    """to other GPUs of the machine, in one direction"""


@dataclass(frozen=True)
class StepWork:
    """The work of one rank in a step."""

    num_tokens: int
    """of a micro-batch"""
    num_micro_batches: int
    pairs_per_token: float
    """tokens that a token sees, itself included, on average: (L + 1) / 2 in samples of L tokens"""
    trained_share: float
    """of the tokens"""
    is_recomputed: bool = False
    """each layer's forward pass runs again in the backward pass"""
    loss_chunk_size: int = 2048


@dataclass(frozen=True)
class Part:
    """A part of a step."""

    name: str
    flops: float
    num_bytes: float
    seconds: float


@dataclass(frozen=True)
class Floor:
    """The least time of a step, by part."""

    parts: tuple[Part, ...]
    hidden: Part
    """communication beside the backward pass, which takes no time of its own"""
    model_flops: int
    """operations that count for the MFU"""
    num_tokens: int
    peak_flops: float

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def mfu(self) -> float:
        return self.model_flops / self.seconds / self.peak_flops


@dataclass(frozen=True)
class _Kernel:
    """Something that runs for a layer and a micro-batch, or for a micro-batch, or for a step."""

    flops: float
    num_bytes: float
    rate: float
    """operations in a second"""

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / self.rate, self.num_bytes / chip.copy_bytes)


def floor(shape: ModelShape, layout: Layout, work: StepWork, chip: Chip) -> Floor:
    """Return the least time of a step of a rank.

    Args:
        layout: without tensor and pipeline parallelism.
    """
    assert layout.tensor == layout.pipeline == 1
    counts = _Counts(shape, layout, work, chip)
    layer_times = shape.num_layers * work.num_micro_batches

    forward_only = [*counts.projections()[:1], *counts.mlp()[:1]]
    parts = [
        counts.part("projections of attention", _flat(counts.projections()), layer_times),
        counts.part(counts.mlp_name, _flat(counts.mlp()), layer_times),
        counts.part("attention", counts.attention(), layer_times),
        counts.part("output layer and loss", counts.output_layer(), work.num_micro_batches),
        counts.part("norms, rotary, SwiGLU, residual", counts.elementwise(), layer_times),
    ]
    if work.is_recomputed:
        again = [*_flat(forward_only), counts.attention()[0], counts.elementwise()[0]]
        parts.append(counts.part("layers computed again", again, layer_times))
    parts.append(counts.part("optimizer", counts.optimizer(), 1))
    if layout.expert > 1:
        parts.append(counts.exchange(layer_times))

    num_tokens = work.num_tokens * work.num_micro_batches
    num_pairs = int(num_tokens * work.pairs_per_token)
    return Floor(
        parts=tuple(parts),
        hidden=counts.gradient_exchange(),
        model_flops=training_flops(shape, num_tokens, num_pairs),
        num_tokens=num_tokens,
        peak_flops=chip.peak_flops,
    )


def _flat(passes: Sequence[Sequence[_Kernel]]) -> list[_Kernel]:
    return [kernel for kernels in passes for kernel in kernels]


class _Counts:
    """Operations and bytes of the kernels of a step.

    Products come as two lists: those of the forward pass, and those of the backward pass.
    """

    def __init__(self, shape: ModelShape, layout: Layout, work: StepWork, chip: Chip) -> None:
        self._shape = shape
        self._layout = layout
        self._work = work
        self._chip = chip
        self._queries = query_size(shape)
        self._keys = key_size(shape)

    def part(self, name: str, kernels: Sequence[_Kernel], times: int) -> Part:
        """Return a part of a step that runs some kernels a number of times."""
        return Part(
            name,
            flops=times * sum(kernel.flops for kernel in kernels),
            num_bytes=times * sum(kernel.num_bytes for kernel in kernels),
            seconds=times * sum(kernel.seconds(self._chip) for kernel in kernels),
        )

    def projections(self) -> tuple[list[_Kernel], list[_Kernel]]:
        hidden = self._shape.hidden_size
        tokens = self._work.num_tokens
        into = self._product(tokens, hidden, self._queries + 2 * self._keys)
        out_of = self._product(tokens, self._queries, hidden)
        return into[0] + out_of[0], into[1] + out_of[1]

    @property
    def mlp_name(self) -> str:
        return "MLP" if self._shape.num_experts is None else "experts"

    def mlp(self) -> tuple[list[_Kernel], list[_Kernel]]:
        shape = self._shape
        rows, width, num_matrices = self._work.num_tokens, shape.ffn_hidden_size, 1
        if shape.num_experts is not None:
            rows *= shape.moe_router_topk
            width = shape.moe_ffn_hidden_size
            num_matrices = shape.num_experts // self._layout.expert
        up = self._product(rows, shape.hidden_size, 2 * width, num_matrices)
        down = self._product(rows, width, shape.hidden_size, num_matrices)
        return up[0] + down[0], up[1] + down[1]

    def attention(self) -> list[_Kernel]:
        """Return the forward and the backward kernel of a layer."""
        tokens = self._work.num_tokens
        flops = 4 * self._queries * tokens * self._work.pairs_per_token
        values = 2 * self._queries + 2 * self._keys
        rate = self._chip.attention_flops
        return [
            _Kernel(flops, tokens * values * _BF16_BYTES, rate),
            _Kernel(_BACKWARD_OF_ATTENTION * flops, 2 * tokens * values * _BF16_BYTES, rate),
        ]

    def output_layer(self) -> list[_Kernel]:
        """Return the products and the passes over the logits of a micro-batch, piece by piece."""
        shape, work = self._shape, self._work
        num_trained = round(work.num_tokens * work.trained_share)

        kernels = []
        for start in range(0, num_trained, work.loss_chunk_size):
            rows = min(work.loss_chunk_size, num_trained - start)
            kernels += _flat(self._product(rows, shape.hidden_size, shape.vocab_size))
            passes = _LOSS_PASSES * rows * shape.vocab_size * _BF16_BYTES
            kernels.append(self._pass(passes))
        return kernels

    def elementwise(self) -> list[_Kernel]:
        """Return the passes over memory of a layer, forward and backward.

        A norm reads and writes a value in the forward pass; in the backward pass it reads two and
        writes one. The heads are divided, normed and rotated in one kernel.
        """
        shape = self._shape
        hidden = shape.hidden_size
        projected = self._queries + 2 * self._keys
        normed = self._queries + self._keys if shape.qk_layernorm else 0

        # Two norms, two residual additions, the heads, the activation.
        forward = 2 * 2 * hidden + 2 * 3 * hidden + 2 * projected
        backward = 2 * 3 * hidden + 2 * 3 * hidden + 2 * projected + normed
        if shape.num_experts is None:
            forward += 3 * shape.ffn_hidden_size
            backward += 5 * shape.ffn_hidden_size
        else:
            # Tokens are copied to their experts, and the experts' outputs added up.
            moved = shape.moe_router_topk * 3 * hidden + hidden
            forward += moved + shape.moe_router_topk * 3 * shape.moe_ffn_hidden_size
            backward += moved + shape.moe_router_topk * 5 * shape.moe_ffn_hidden_size
        token_bytes = self._work.num_tokens * _BF16_BYTES
        return [self._pass(forward * token_bytes), self._pass(backward * token_bytes)]

    def optimizer(self) -> list[_Kernel]:
        """Return Adam, the gradient's norm, and the zeroing of the gradients."""
        dense, experts = self._num_parameters()
        # The ranks that hold the same experts divide their state among them.
        num_stepped = dense / self._layout.data + experts / self._layout.expert_data
        stepped = (_ADAM_BYTES + _FLOAT32_BYTES) * num_stepped
        return [self._pass(stepped + _FLOAT32_BYTES * (dense + experts))]

    def exchange(self, times: int) -> Part:
        """Return the way of the tokens to the ranks of their experts and back, twice."""
        shape = self._shape
        ranks = self._layout.expert
        copies = self._work.num_tokens * shape.moe_router_topk
        num_bytes = copies * shape.hidden_size * _BF16_BYTES * (ranks - 1) / ranks
        num_exchanges = times * (6 if self._work.is_recomputed else 4)
        total = num_bytes * num_exchanges
        return Part("exchange of tokens", 0, total, total / self._chip.link_bytes)

    def gradient_exchange(self) -> Part:
        """Return the sum of the gradients over the ranks, and the way of the new weights back."""
        dense, experts = self._num_parameters()
        total = 0.0
        for num, ranks in ((dense, self._layout.data), (experts, self._layout.expert_data)):
            total += num * (_FLOAT32_BYTES + _BF16_BYTES) * (ranks - 1) / ranks
        return Part("exchange of gradients", 0, total, total / self._chip.link_bytes)

    def _num_parameters(self) -> tuple[int, int]:
        """Return this rank's parameters: those of experts that are spread, and all others."""
        shape = self._shape
        experts = shape.num_layers * (shape.num_experts or 0) * layer_parameters(shape).expert
        if self._layout.expert == 1:
            return total_parameters(shape), 0
        return total_parameters(shape) - experts, experts // self._layout.expert

    def _product(
        self, rows: int, num_in: int, num_out: int, num_matrices: int = 1
    ) -> tuple[list[_Kernel], list[_Kernel]]:
        """Return a product of a layer: forward; and its gradients of the input and the weight."""
        flops = 2 * rows * num_in * num_out
        weights = num_in * num_out * num_matrices
        activations = rows * (num_in + num_out) * _BF16_BYTES
        rate = self._chip.product_flops

        of_input = _Kernel(flops, activations + weights * _BF16_BYTES, rate)
        # It reads and writes the sum in float32.
        of_weight = _Kernel(flops, activations + 2 * weights * _FLOAT32_BYTES, rate)
        return [of_input], [of_input, of_weight]

    def _pass(self, num_bytes: float) -> _Kernel:
        return _Kernel(0, num_bytes, self._chip.product_flops)


_PRODUCT_FLOPS = 777e12
_FLASH_2_FLOPS = 210e12
_LINK_BYTES = 360e9


def _hopper(name: str, copy_bytes: float) -> Chip:
    return Chip(name, 989e12, _PRODUCT_FLOPS, _FLASH_2_FLOPS, copy_bytes, _LINK_BYTES)


CHIPS = (_hopper("H100 SXM", 2.9e12), _hopper("H200", 4.3e12))
"""Measured on an H100: a large product in bfloat16 (of 989 TFLOP/s in the data sheet),
FlashAttention 2 on packed samples of 300 to 2,000 tokens, and a large copy (of 3.35 TB/s). An H200
has the same processor; its memory (4.8 TB/s) and the links (450 GB/s) are taken at 90 and 80 %."""
