"""One reason for refusing flags, with the flags that it covers."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Flags that are refused for one reason."""

    reason: str
    """what follows the flag's name"""
    remedy: str
    names: str
    """divided by blanks; one that ends in `*` stands for all names that begin like it"""

    def covers(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names.split())
