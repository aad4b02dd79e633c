"""transformers without torch, in a process that is known to need no model.

    transformers asks once whether torch is there, and imports it if so: one to two seconds of CPU
    and 170 MB, for tokenizers that use none of it. It has no setting for that (5.23)

Whoever imports transformers later in the process finds no models in it. So only a command that is a
process of its own, and trains nothing, may ask for this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
"""transformers says that torch is not there, unless this is set."""


@dataclass
class _Process:
    """The needs of this process."""

    needs_models: bool = True


_process = _Process()


def spare_torch() -> None:
    """Note that this process needs no model of transformers."""
    _process.needs_models = False


@contextmanager
def importing_transformers(*, may_need_torch: bool) -> Iterator[None]:
    """Import transformers, within the context, without torch where that is asked for.

    A process that has either of them already is left as it is.

    Args:
        may_need_torch: as code does that a tokenizer brings.
    """
    is_there = "torch" in sys.modules or "transformers" in sys.modules
    if _process.needs_models or may_need_torch or is_there:
        yield
        return

    said = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's mark of "not there"
    try:
        yield
    finally:
        del sys.modules["torch"]
        if said is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = said
