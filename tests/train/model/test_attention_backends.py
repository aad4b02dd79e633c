"""The choice of an attention kernel, and what each is called with. Kernels themselves need a GPU.

Packages that cannot be installed here are written as modules of a few lines, whose attention is the
definition: only the choice of them and the call are tested.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.errors import ConfigError
from miles.train.model import attention_backends, device, long_segments
from miles.train.model.attention_backends import Segments, attention, by_segment

LENGTHS = (3, 1, 4)
CU_SEQLENS = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
SEGMENTS = Segments(CU_SEQLENS, LENGTHS, CU_SEQLENS)
SCALE = 0.3

FLASH_ATTN = """
import torch
from miles.train.model.attention_backends import Segments, by_segment

calls = []

def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           softmax_scale, causal, deterministic):
    calls.append((max_seqlen_q, max_seqlen_k, causal, deterministic))
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    segments = Segments(cu_seqlens_q, tuple(cu_seqlens_q.diff().tolist()), cu_seqlens_q)
    out = by_segment(q, k, v, segments, softmax_scale)
    return (out, None) if {returns_sums} else out
"""

TRANSFORMER_ENGINE = """
from miles.train.model.attention_backends import Segments, by_segment

built = []

class DotProductAttention:
    def __init__(self, num_attention_heads, kv_channels, *, num_gqa_groups, attention_dropout,
                 qkv_format, attn_mask_type, softmax_scale):
        built.append((num_attention_heads, kv_channels, num_gqa_groups, attention_dropout))
        self.scale = softmax_scale

    def __call__(self, q, k, v, *, qkv_format, attn_mask_type, cu_seqlens_q, cu_seqlens_kv,
                 max_seqlen_q, max_seqlen_kv):
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert max_seqlen_q == max_seqlen_kv == 4
        segments = Segments(cu_seqlens_q, tuple(cu_seqlens_kv.diff().tolist()), cu_seqlens_q)
        return by_segment(q, k, v, segments, self.scale).flatten(1)
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of importable packages, on a machine with a GPU."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    names = ("flash_attn", "flash_attn_interface", "transformer_engine")
    attention.cache_clear()
    yield tmp_path
    attention.cache_clear()
    attention_backends._dot_product_attention.cache_clear()
    for module in list(sys.modules):
        if module.split(".")[0] in names:
            del sys.modules[module]


def install(packages: Path, module: str, text: str) -> None:
    path = packages.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, 4, 16, generator=generator)
    key = torch.randn(8, 2, 16, generator=generator)
    return query, key, torch.randn(8, 2, 16, generator=generator)


@pytest.mark.parametrize("backend", ["auto", "flash", "fused", "local", "unfused"])
def test_a_cpu_computes_by_segment_whatever_is_asked(backend: str) -> None:
    attention.cache_clear()
    assert attention(backend) is by_segment


@pytest.mark.parametrize("backend", ["local", "unfused"])
def test_a_gpu_can_be_told_to_compute_by_segment(packages: Path, backend: str) -> None:
    assert attention(backend) is by_segment


@pytest.mark.parametrize(
    ("capability", "installed", "taken"),
    [
        (
            8,
            ["flash_attn.cute", "flash_attn.flash_attn_interface"],
            "flash_attn.flash_attn_interface",
        ),
        (9, ["flash_attn.cute", "flash_attn_interface"], "flash_attn_interface"),
        (9, ["flash_attn.cute"], "flash_attn.cute"),
        (9, ["flash_attn.flash_attn_interface"], "flash_attn.flash_attn_interface"),
        (10, ["flash_attn.cute", "flash_attn_interface"], "flash_attn.cute"),
    ],
)
def test_flash_takes_the_best_package_for_the_gpu(
    packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    installed: list[str],
    taken: str,
) -> None:
    gpu(monkeypatch, capability)
    for module in installed:
        install(packages, module, FLASH_ATTN.format(returns_sums=module == "flash_attn.cute"))

    out = attention("flash")(*tensors(), SEGMENTS, SCALE)

    torch.testing.assert_close(out, by_segment(*tensors(), SEGMENTS, SCALE))
    assert sys.modules[taken].calls == [(4, 4, True, False)]


def test_the_packages_compute_deterministically_if_torch_does(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, 9)
    install(packages, "flash_attn_interface", FLASH_ATTN.format(returns_sums=False))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)

    attention("flash")(*tensors(), SEGMENTS, SCALE)
    assert sys.modules["flash_attn_interface"].calls[0][-1] is True


def test_flash_without_a_package_is_torchs_kernel(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, 8)
    install(packages, "flash_attn_interface", FLASH_ATTN.format(returns_sums=False))

    with pytest.warns(UserWarning, match="no flash-attn package for this GPU is installed"):
        chosen = attention("flash")
    assert chosen is attention("auto")


def test_fused_is_transformer_engines_attention(packages: Path) -> None:
    install(packages, "transformer_engine.pytorch", TRANSFORMER_ENGINE)

    for _ in range(2):
        out = attention("fused")(*tensors(), SEGMENTS, SCALE)
        torch.testing.assert_close(out, by_segment(*tensors(), SEGMENTS, SCALE))
    assert sys.modules["transformer_engine.pytorch"].built == [(4, 16, 2, 0.0)]


def test_fused_without_transformer_engine_is_refused(packages: Path) -> None:
    with pytest.raises(ConfigError, match=r"--attention-backend fused .* install transformer-eng"):
        attention("fused")


def test_torchs_kernel_takes_fewer_key_heads(packages: Path) -> None:
    query, key, value = (tensor.to("meta", torch.bfloat16).requires_grad_() for tensor in tensors())
    segments = Segments(CU_SEQLENS.to("meta"), LENGTHS, CU_SEQLENS.to("meta"))

    out = attention("auto")(query, key, value, segments, SCALE)
    out.sum().backward()

    assert out.shape == query.shape
    assert key.grad is not None
    assert key.grad.shape == key.shape


def test_a_single_token_is_no_special_case_for_kernels() -> None:
    # FlashAttention 2 swaps heads and tokens where the longest segment has 1.
    assert Segments(torch.zeros(3), (1, 1), torch.zeros(3)).longest == 2
    assert Segments(torch.zeros(3), (1, 5), torch.zeros(3)).longest == 5


def test_long_segments_go_to_cudnn_and_the_others_together(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of 3, 1, 38, 2 and 33 tokens: only 38 and 33 are long. Values on the CPU."""
    lengths = (3, 1, 38, 2, 33)
    packed: list[tuple[int, ...]] = []
    alone: list[int] = []

    def varlen(query: Any, key: Any, value: Any, segments: Segments, scale: float) -> Any:
        packed.append(segments.lengths)
        assert segments.cu_seqlens.diff().tolist() == list(segments.lengths)
        return by_segment(query, key, value, segments, scale)

    def backend(choice: object) -> Any:
        alone.append(1)
        return nullcontext()

    monkeypatch.setattr(long_segments, "LONG_TOKENS", 32)
    monkeypatch.setattr(long_segments, "sdpa_kernel", backend)
    monkeypatch.setattr(attention_backends, "is_usable", lambda query, key: True)
    monkeypatch.setattr(attention_backends, "_torch_varlen", varlen)

    segments = Segments(
        torch.tensor([0, *lengths]).cumsum(0).int(), lengths, torch.tensor([0, 3, 4, 6])
    )
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(77, heads, 16, generator=generator) for heads in (4, 2, 2)]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    plain = [tensor.clone().requires_grad_() for tensor in inputs]

    out = attention("auto")(*ours, segments, SCALE)
    expected = by_segment(*plain, segments, SCALE)
    weight = torch.randn(expected.shape, generator=generator)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()

    assert packed == [(3, 1, 2)]
    assert len(alone) == 2
    torch.testing.assert_close(out, expected)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_long_segment_is_padded_by_less_than_a_sixteenth() -> None:
    for length in (4097, 4352, 8193, 16385, 30000):
        padded = long_segments.padded_length(length)
        assert length <= padded < length * 17 / 16
    lengths = {long_segments.padded_length(length) for length in range(4097, 32769)}
    assert len(lengths) == 48  # 16 plans between powers of two
