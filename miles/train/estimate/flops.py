"""Floating-point operations of a step, exactly, and the peak of a GPU, for the MFU.

    matrices    2 for each token and each parameter of a matrix that it goes through
    attention   2 x 2 for each channel of a head and each pair of a token and one that it sees:
                scores, then values

A sample of L tokens has L (L + 1) / 2 such pairs: the causal half counts once, and nothing counts
across samples. The backward pass takes twice the forward pass; of frozen matrices, beside which an
adapter is trained, it takes as much as the forward pass. Looking up an embedding is no
multiplication. Norms, rotations and the softmax are left out, as is usual. Recomputation is left
out too, because MFU is about the model's operations.

Sources: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B, for MFU.
"""

from __future__ import annotations

import re

from miles.architecture.adapter import AdapterShape, total_adapter_parameters
from miles.architecture.config import ModelShape
from miles.architecture.sizes import matrix_parameters, query_size

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"H[18]00 PCIe", 756.0),
    (r"H[128]00 NVL", 835.0),
    (r"GH200|H200|H100|H800", 989.0),
    (r"H20\b", 148.0),
    (r"A[18]00\b", 312.0),
    (r"L40S", 362.0),
    (r"L40\b", 181.0),
    (r"L4\b", 121.0),
    (r"A40\b", 149.7),
    (r"A10G\b", 70.0),
    (r"A10\b", 125.0),
    (r"RTX 4090$", 165.2),
    (r"RTX 3090$", 71.0),
)
"""Pattern of the GPU's name -> peak in bfloat16 without sparsity, accumulated in float32.

From NVIDIA's data sheets, whose numbers with sparsity are twice as high. The first pattern that
fits counts. (A V100 has no bfloat16.)"""

_PART = re.compile(r"\bMIG\b|-\d+[ABCQ]$")
"""Pattern in the name of a part of a GPU: "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA A10-8Q"."""


def training_flops(
    shape: ModelShape,
    num_tokens: int,
    num_causal_pairs: int,
    adapter: AdapterShape | None = None,
) -> int:
    """Return the operations of a step, forward and backward.

    Args:
        num_tokens: tokens of all samples.
        num_causal_pairs: sum over samples of L (L + 1) / 2.
        adapter: that alone is trained; None: all weights are.
    """
    matrices = 2 * matrix_parameters(shape) * num_tokens
    attention = 4 * shape.num_layers * query_size(shape) * num_causal_pairs
    if adapter is None:
        return 3 * (matrices + attention)

    of_adapter = 2 * total_adapter_parameters(shape, adapter) * num_tokens
    return 2 * matrices + 3 * (of_adapter + attention)


def peak_flops(device_name: str) -> float | None:
    """Return the operations a second that a GPU can do in bfloat16; None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, such as "NVIDIA H100 80GB HBM3".
    """
    if _PART.search(device_name):
        return None
    for pattern, tflops in PEAK_TFLOPS:
        if re.search(rf"\b(?:{pattern})", device_name):
            return tflops * 1e12
    return None
