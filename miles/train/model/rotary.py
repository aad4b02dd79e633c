"""Rotary embeddings: the angle of each token by its position, once a micro-batch.

    position_ids     0    1    2    0    1        two segments, of 3 and 2 tokens
    angles           0    f   2f    0    f        for each frequency f of a head
    cos, sin         [tokens, head size], which every layer applies to query and key

Element i of a head and element i + size / 2 are turned by the same angle, as in Hugging Face's
models. megatron-core 0.16.1 rotates one segment after another in every layer, and asks the GPU for
their lengths each time.

Cosine and sine stay in float32. The layers multiply in float32, too, and round the result once;
Megatron and transformers round cosine and sine to the model's precision, and each product again. In
bfloat16 that adds half to the error, and saves little: the tables are small beside query and key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.architecture.config import ModelShape
from miles.train.model.device import torch_device


@dataclass(frozen=True)
class Rotation:
    """The rotation of each token of a micro-batch."""

    cos: Tensor
    """float32 [tokens, head size], the second half equal to the first"""
    sin: Tensor
    """float32 [tokens, head size], the second half equal to the first"""


class RotaryFrequencies:
    """The frequencies of a model's rotary embedding.

    No module: it has no parameters, and no place in a checkpoint.

    Args:
        inverse: float32 [head size / 2]: the angle of position 1.
    """

    def __init__(self, inverse: Tensor) -> None:
        self._inverse = inverse

    @classmethod
    def of(cls, shape: ModelShape) -> RotaryFrequencies:
        """Return the frequencies of a model, Llama 3's scaling included, on the device."""
        from megatron.core.models.common.embeddings import RotaryEmbedding

        embedding = RotaryEmbedding(
            shape.kv_channels,
            rotary_percent=1.0,
            rotary_base=int(shape.rotary_base),
            rope_scaling=shape.rope_scaling_factor is not None,
            rope_scaling_factor=shape.rope_scaling_factor or 1.0,
            # On the CPU, as transformers does: a GPU's power function differs in the last bit.
            use_cpu_initialization=True,
        )
        return cls(embedding.inv_freq.to(torch_device()))

    def rotation(self, position_ids: Tensor) -> Rotation:
        """Return the rotation of each token.

        Args:
            position_ids: int64 [1, tokens]. Every position has its angle; there is no table to
                outgrow.
        """
        angles = torch.outer(position_ids.flatten().to(self._inverse.dtype), self._inverse)
        cos, sin = angles.cos(), angles.sin()
        return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))
