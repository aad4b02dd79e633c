"""Tells texts that are certainly in NFC, quickly.

    "naïve", "你好", "привет", "한국"    of inert characters only: in NFC
    "cafe\\u0301"                        perhaps not: the normalizer has to look

A character is inert here if it has no combining class, is its own NFC, and is the second part of no
composition. A text of inert characters alone passes the quick check of Unicode's annex 15, so it is
in NFC. The table has the inert characters of the usual scripts, as far as Unicode 14 has assigned
them; by Unicode's stability policy they stay inert.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from miles.data.types import Bool

_INERT = """
    0000-02ff 0388-038a 038c-038c 038e-03a1 03a3-0482 0488-052f 0531-0556 0559-058a
    05d0-05ea 061b-064a 0660-066f 0671-06d5 06ee-070d 0900-093b 093d-094c 0950-0950
 0960-0983 0e01-0e37 0e3f-0e47 10d0-10ff 1e00-1f15 2002-2064 2070-2071
    2074-208e 20a0-20c0 2100-2125 212c-218b 2190-2328 232b-2426 2460-2adb 2add-2b73
    2e80-2e99 2e9b-2ef3 2f00-2fd5 2ff0-2ffb 3000-3029 3030-303f 3041-3096 309b-30ff
    3105-312f 3131-318e 3190-31e3 31f0-321e 3220-a48c ac00-d7a3 e000-f8ff fe00-fe0f
    fe30-fe52 fe54-fe66 fe68-fe6b ff01-ffbe fffc-fffd 1d400-1d454 1d456-1d49c
    1d552-1d6a5 1d6a8-1d7cb 1f000-1f02b 1f030-1f093 1f100-1f1ad 1f1e6-1f202
    1f300-1f6d7 1f700-1f773 1f780-1f7d8 1f900-1fa53 20000-2a6df 2a700-2b738
"""
"""Ranges of code points, both ends included."""


def is_inert(texts: Sequence[str]) -> bool:
    """Return whether all texts have inert characters only, so that each is in NFC.

    Half of a surrogate pair is not inert.
    """
    code_points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return bool(_table().take(code_points).all())


@cache
def _table() -> Bool:
    """Return for every code point whether it is inert."""
    table = np.zeros(0x110000, np.bool_)
    for inert_range in _INERT.split():
        first, last = inert_range.split("-")
        table[int(first, 16) : int(last, 16) + 1] = True
    return table
