"""The data path: rows -> conversations -> tokens and masks -> packed steps.

In: a `DataConfig`, which names files and settings. Out: micro-batches for every rank, step by step.
It runs in the driver, the loaders, the feed and the trainers; README.md follows one row through the
rooms and processes. `types.py` declares the records between the rooms. May import `miles.common`
and `miles.errors`.

`miles.data.prepare` and `miles.data.encode` are functions. They are imported, with what they need,
when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.data.encoding.encoder import encode
    from miles.data.notebook.prepare import prepare

__all__ = ["encode", "prepare"]


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used."""
    from miles.common.ctrl_c import on_ctrl_c

    with on_ctrl_c("stopped; nothing was begun"):
        if name == "encode":
            from miles.data.encoding.encoder import encode

            return encode
        if name == "prepare":
            from miles.data.notebook.prepare import prepare

            return prepare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what tab completion shows: the functions, without the rooms behind them."""
    return __all__
