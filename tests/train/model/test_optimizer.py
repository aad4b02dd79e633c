"""The optimizer: a missing package is named, and the gradient's norm is Megatron's."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from miles.errors import ConfigError
from miles.train.model import device, gradient_norm, megatron_on_cpu
from miles.train.model.optimizer import require_installed
from miles.train.optimizer_settings import OptimizerSettings

ALONE = OptimizerSettings(precision_aware=True)
OFFLOADED = OptimizerSettings(precision_aware=True, cpu_offload=True)
HALF = OptimizerSettings(precision_aware=True, cpu_offload=True, offload_fraction=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ALONE, "FusedAdam of Transformer Engine, which is not installed here"),
        (HALF, "--optimizer-offload-fraction 0.5 needs Transformer Engine"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, settings: OptimizerSettings, message: str
) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    assert importlib.util.find_spec("transformer_engine") is None
    with pytest.raises(ConfigError, match=message):
        require_installed(settings)


def test_the_rest_needs_none() -> None:
    for settings in (OptimizerSettings(), OFFLOADED, HALF):
        require_installed(settings)


def gradients() -> list[torch.Tensor]:
    """Return gradients of very unequal sizes; one of them has no elements."""
    generator = torch.Generator().manual_seed(4)
    sizes = [(300, 70), (1,), (0,), (64,), (5, 5, 5)]
    return [torch.randn(size, generator=generator) * 10 for size in sizes]


def test_the_norm_is_megatrons() -> None:
    from megatron.core.utils import local_multi_tensor_l2_norm

    megatron_on_cpu.activate()
    wanted, _ = local_multi_tensor_l2_norm(0, None, [gradients()], False)
    found, _ = gradient_norm.l2_norm(0, None, [gradients()], False)
    exact = torch.cat([each.reshape(-1) for each in gradients()]).double().norm()
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("is_in_place", [True, False])
def test_clipping_is_megatrons(is_in_place: bool) -> None:
    from megatron.core.utils import local_multi_tensor_scale

    wanted = gradients()
    local_multi_tensor_scale(0, None, [wanted, wanted], 0.3)
    sources = gradients()
    targets = sources if is_in_place else [torch.zeros_like(each) for each in sources]
    gradient_norm.scale(0, None, [sources, targets], 0.3)
    for target, tensor in zip(targets, wanted, strict=True):
        assert torch.equal(target, tensor)
    assert is_in_place or torch.equal(sources[0], gradients()[0]), "the sources are as they were"


def test_megatron_calls_the_functions() -> None:
    from megatron.core.optimizer import clip_grads

    gradient_norm.install()
    assert clip_grads.l2_norm_impl is gradient_norm.l2_norm
    assert clip_grads.multi_tensor_scale_impl is gradient_norm.scale
