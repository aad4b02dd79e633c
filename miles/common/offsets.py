"""Lengths -> offsets, for arrays that hold many lists end to end.

    lengths    3 1 2
    offsets    0 3 4 6

List i is `values[offsets[i] : offsets[i + 1]]`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def offsets_of(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return where each of consecutive lists begins, and where the last one ends.

    Args:
        lengths: integers [lists].

    Returns:
        int64 [lists + 1]: the exclusive prefix sums, and the total.
    """
    lengths = np.asarray(lengths)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
