"""Bring the tokens to the ranks of their experts and back, asking the GPU at most once a layer.

    tokens -> copies by expert -> exchange between expert-parallel ranks -> gather over the expert's
    tensor-parallel ranks -> sorted by local expert -> the experts -> the same way back

The steps are those of Megatron's `MoEAlltoAllTokenDispatcher`, whose place this takes in the layer.
Megatron permutes by boolean masks and takes all counts to the host. Here every size but those of
the exchange is known beforehand, and without an exchange nothing is asked. The local experts are in
descending order, as `grouped_product` needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.train.model.permutation import Permutation, Routing, route, sort_chunks


class TokenDispatcher:
    """The dispatcher of a layer. Its methods are called by Megatron's `MoELayer`, in this order.

    Args:
        counts: Megatron's `MoEAlltoAllTokenDispatcher` of the layer, which knows the ranks and
            exchanges the counts of tokens.
    """

    def __init__(self, counts: Any) -> None:
        config = counts.config
        assert config.moe_expert_capacity_factor is None, "no token is dropped"
        self._counts = counts
        self._num_choices: int = config.moe_router_topk
        self._is_spread: bool = counts.ep_size * counts.tp_size > 1
        self._must_sort: bool = self._is_spread and counts.num_local_experts > 1

        # The state of a forward pass.
        self._shape: torch.Size
        self._routing: Routing
        self._ends: Tensor
        self._sizes: _Sizes
        self._by_expert: Permutation
        self._dtype: torch.dtype

    def dispatch_preprocess(
        self, hidden: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the copies of the tokens, sorted by expert, and the probability of each.

        Args:
            hidden: [tokens, 1, hidden size]
            routing_map: bool [tokens, experts], with as many experts for each token
            probs: [tokens, experts]
        """
        self._shape = hidden.shape
        self._dtype = probs.dtype
        chosen = self._descending(routing_map)

        tokens_per_expert = self._counts.preprocess(chosen)
        self._ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
        if self._is_spread:
            self._sizes = _Sizes(self._counts)

        self._routing = route(chosen, self._num_choices)
        copies = self._routing.permutation.copy(hidden.view(-1, hidden.shape[-1]))
        return copies, self._routing.of_copies(self._descending(probs))

    def token_dispatch(self, copies: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange the copies with the ranks that hold other experts."""
        if self._counts.ep_size == 1:
            return copies, probs
        return self._exchange(copies), self._exchange(probs)

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of the local experts, where those of each end, and probabilities."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        if self._counts.tp_size > 1:
            sizes, group = self._sizes.on_host().of_tensor_ranks, self._counts.tp_group
            rows = gather_from_sequence_parallel_region(rows, group=group, output_split_sizes=sizes)
            probs = gather_from_sequence_parallel_region(
                probs, group=group, output_split_sizes=sizes
            )

        if self._must_sort:
            chunks = self._counts.num_global_tokens_per_local_expert
            self._by_expert = sort_chunks(chunks, len(rows))
            rows, probs = self._by_expert.copy(rows), self._by_expert.copy(probs)
        return rows, self._ends, probs

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """Return no buffers: the experts write into memory of their own. megatron-core 0.19 asks."""
        return None, None

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        """Sort the outputs as the tokens came, and add those of the expert's tensor ranks."""
        from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region

        if self._must_sort:
            rows = self._by_expert.add_up(rows)
            del self._by_expert  # autograd keeps what it needs
        if self._counts.tp_size > 1:
            summed = reduce_scatter_to_sequence_parallel_region(
                rows.to(self._dtype),
                group=self._counts.tp_group,
                input_split_sizes=self._sizes.on_host().of_tensor_ranks,
            )
            rows = summed.to(rows.dtype)
        return rows

    def token_combine(self, rows: Tensor) -> Tensor:
        """Exchange the outputs back to the ranks of their tokens."""
        return rows if self._counts.ep_size == 1 else self._exchange(rows, back=True)

    def combine_postprocess(self, copies: Tensor) -> Tensor:
        """Return the sum of each token's outputs, [tokens, 1, hidden size]."""
        permutation = self._routing.permutation
        del self._routing
        return permutation.add_up(copies).view(self._shape)

    def _descending(self, table: Tensor) -> Tensor:
        """Return [tokens, experts] with the experts of each rank in descending order."""
        shape = (len(table), self._counts.ep_size, self._counts.num_local_experts)
        return table.view(shape).flip(2).flatten(1)

    def _exchange(self, values: Tensor, *, back: bool = False) -> Tensor:
        from megatron.core.tensor_parallel import all_to_all

        sizes = self._sizes.on_host()
        sent, received = (sizes.received, sizes.sent) if back else (sizes.sent, sizes.received)
        exchanged: Tensor = all_to_all(self._counts.ep_group, values, received, sent)
        return exchanged


@dataclass(frozen=True)
class _HostSizes:
    """The numbers of rows that are exchanged."""

    sent: list[int]
    """to each expert-parallel rank"""
    received: list[int]
    """from each expert-parallel rank"""
    of_tensor_ranks: list[int]
    """that each of the expert's tensor-parallel ranks received"""


class _Sizes:
    """The numbers of rows that are exchanged, on their way to the host.

    The copy runs beside the permutation of the tokens; the host waits when it needs the numbers.

    Args:
        counts: Megatron's dispatcher, after its `preprocess`.
    """

    def __init__(self, counts: Any) -> None:
        parts = (counts.input_splits, counts.output_splits, counts.output_splits_tp)
        self._lengths = [len(part) for part in parts]
        self._values = torch.cat(parts)
        self._copied: Any = None
        if self._values.is_cuda:
            self._start_copy(counts.cuda_dtoh_stream)

    def _start_copy(self, stream: Any) -> None:
        on_gpu = self._values
        self._values = torch.empty(on_gpu.shape, dtype=on_gpu.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._values.copy_(on_gpu, non_blocking=True)
            on_gpu.record_stream(stream)
        self._copied = stream.record_event()

    def on_host(self) -> _HostSizes:
        """Return the numbers. The first call waits for the copy."""
        if self._copied is not None:
            self._copied.synchronize()
        parts = self._values.split(self._lengths)
        return _HostSizes(*[part.tolist() for part in parts])
