"""Shapes of models that exist only as numbers."""

from __future__ import annotations

from miles.architecture.config import ModelShape

HAND_COUNTED = ModelShape("qwen3", 2, 8, 16, 2, 1, 4, 10, 64, 1e4, 1e-6, False, True, False)
"""So small that its parameters and operations can be counted by hand."""
