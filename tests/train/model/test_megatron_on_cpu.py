"""The layer that lets Megatron run on a CPU."""

from __future__ import annotations

import pytest
import torch

from miles.train.model import megatron_on_cpu


def test_a_gpu_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is available"):
        megatron_on_cpu.activate()
