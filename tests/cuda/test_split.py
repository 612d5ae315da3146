"""On how many CTAs the fused products are launched on an H100, which has 132 multiprocessors."""

from __future__ import annotations

from itertools import product

import pytest
from launcher import Device
from recorded_gpu import Limits

SHAPES = [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]  # [N, K]
ROWS = (1, 16, 32, 64)
# As many as there are units, of 128 rows x 512 or 256 of the weight, or of 32 rows x 1024.
UNITS = {
    ("linear_4bit", 1, (1024, 4096)): 8 * 8,
    ("linear_4bit", 16, (1024, 4096)): 8 * 16,
    ("linear_4bit_dgrad", 1, (1024, 4096)): 4 * 32,
}
# More would finish later: the last of a tile's CTAs adds up partial sums of 32 to 128 KB.
WORTH = {
    ("linear_4bit", 32, (1024, 4096)): 45,
    ("linear_4bit", 64, (1024, 4096)): 32,
    ("linear_4bit", 64, (4096, 4096)): 128,
    ("linear_4bit_dgrad", 16, (1024, 4096)): 32,
    ("linear_4bit_dgrad", 32, (1024, 4096)): 45,
    ("linear_4bit_dgrad", 64, (1024, 4096)): 32,
    ("linear_4bit_dgrad", 16, (4096, 4096)): 64,
    ("linear_4bit_dgrad", 32, (4096, 4096)): 91,
    ("linear_4bit_dgrad", 64, (4096, 4096)): 64,
    ("linear_4bit_dgrad", 16, (14336, 4096)): 120,
    ("linear_4bit_dgrad", 64, (14336, 4096)): 120,
}
CASES = list(product(("linear_4bit", "linear_4bit_dgrad"), ROWS, SHAPES))


@pytest.mark.parametrize(("op", "m", "nk"), CASES, ids=str)
def test_every_multiprocessor_has_work_where_that_is_faster(op: str, m: int, nk: tuple[int, int]) -> None:
    fewer = UNITS | WORTH
    ctas = Device(Limits(132, 228 * 1024)).ctas(op, (m, *nk))
    if (op, m, nk) in fewer:
        assert ctas == fewer[op, m, nk]
    else:
        assert ctas >= 132
