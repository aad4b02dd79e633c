"""The data path: rows -> conversations -> tokens and masks -> packed steps. See README.md in this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.data.encode import encode
    from miles.data.prepare import prepare

__all__ = ["encode", "prepare"]


def __getattr__(name: str) -> Any:
    """Imports Ray and transformers when they are first wanted, not with the package."""
    if name == "encode":
        from miles.data.encode import encode

        return encode
    if name == "prepare":
        from miles.data.prepare import prepare

        return prepare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
