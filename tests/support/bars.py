"""The bars of a conversion, as they stood when each was done."""

from __future__ import annotations

import itertools
import re

_CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
_BAR = re.compile(r"(\w+) ━+ +([\d.]+)/([\d.]+) kB")


def last_bars(screen: str) -> list[tuple[str, str, str]]:
    """Return the label of each bar, what was done, and its total, in their order.

    A busy machine sees a bar more than once on its way. Bars of one label in a row count as one.

    Args:
        screen: what was printed.
    """
    bars = _BAR.findall(_CODES.sub("", screen))
    return [list(shown)[-1] for _, shown in itertools.groupby(bars, lambda bar: bar[0])]
