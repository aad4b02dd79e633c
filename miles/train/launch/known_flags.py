"""The names that a launch line may have: flags that are taken, or refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from miles.errors import ConfigError
from miles.train.launch.refusals import REFUSALS


def require_known(flag: str, known: Collection[str], where: str = "") -> None:
    """Check that a flag is one of those that exist here.

    Args:
        flag: as it is written, `--name`.
        known: the flags of a parser.
        where: stands before the message.

    Raises:
        ConfigError: names the flag, why it is refused, and what to do.
    """
    if flag in known:
        return
    name = flag.removeprefix("--").replace("-", "_")
    for refusal in REFUSALS:
        if refusal.covers(name):
            raise ConfigError(f"{where}{flag} {refusal.reason}; {refusal.remedy}")

    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "see miles train --help or docs/flags.md"
    raise ConfigError(f"{where}there is no flag {flag}; {hint}")
