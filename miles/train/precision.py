"""The number format that a run computes in."""

from __future__ import annotations

from enum import StrEnum


class Precision(StrEnum):
    """The format of weights and activations. The optimizer works in float32 whatever it is.

    The values are the names that torch has for them.
    """

    FP32 = "float32"
    BF16 = "bfloat16"
    FP16 = "float16"

    @classmethod
    def named(cls, name: str | None) -> Precision | None:
        """Return the one of a name in a file; None where it is none of these."""
        return next((precision for precision in cls if precision == name), None)

    @property
    def flag(self) -> str:
        """Return the flag that asks for it."""
        return {"float32": "--no-bf16", "bfloat16": "--bf16", "float16": "--fp16"}[self]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one value."""
        return 4 if self is Precision.FP32 else 2

    @property
    def has_master_weights(self) -> bool:
        """Return whether the optimizer keeps weights of its own, in float32."""
        return self is not Precision.FP32
