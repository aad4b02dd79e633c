"""A package that the optimizer needs and that is missing is named in one line."""

from __future__ import annotations

import importlib.util

import pytest

from miles.errors import ConfigError
from miles.train.model import device
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
