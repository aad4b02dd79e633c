import numpy as np
import pytest

from miles.common.offsets import offsets_of


@pytest.mark.parametrize("lengths", [[3, 1, 0, 2], np.array([3, 1, 0, 2], np.int32)])
def test_offsets_are_exclusive_sums(lengths):
    offsets = offsets_of(lengths)

    assert offsets.tolist() == [0, 3, 4, 4, 6]
    assert offsets.dtype == np.int64


def test_no_lists_have_one_offset():
    assert offsets_of([]).tolist() == [0]


def test_sums_beyond_int32_are_exact():
    assert offsets_of(np.full(3, 2**31 - 1, np.int32))[-1] == 3 * (2**31 - 1)
