"""Weights of more than 2^31 elements: every index is 64 bits wide."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from reference import assert_same, dequantize_4bit, quantize

ops = torch.ops.qlora_ext
PERIOD = 4096
REPEATS = 2**31 // PERIOD + 1  # of one row, so that every row must give what the first one gives

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def row() -> torch.Tensor:
    return normal(1, PERIOD, dtype=torch.bfloat16)


@pytest.mark.parametrize("extra", [0, 33], ids=["rows", "flat-odd"])
def test_quantize_and_dequantize(row: torch.Tensor, extra: int) -> None:
    """The weight is 4 GB, and so is the decoded one: they are never there at the same time."""
    whole = REPEATS * PERIOD
    weight = torch.empty(whole + extra, dtype=torch.bfloat16)
    weight[:whole].view(REPEATS, PERIOD).copy_(row)
    weight[whole:] = row[0, :extra]
    packed, absmax = ops.quantize_4bit(weight if extra else weight.view(REPEATS, PERIOD), "nf4", 64)
    del weight
    expected = quantize(row, "nf4", 64)
    assert (packed.view(-1)[: whole // 2].view(REPEATS, -1) == expected.packed).all()
    assert (absmax.view(-1)[: whole // 64].view(REPEATS, -1) == expected.absmax).all()

    decoded = ops.dequantize_4bit(packed, absmax, None, None, "nf4", 64, (whole + extra,), torch.bfloat16)
    decoded_row = dequantize_4bit(expected, (PERIOD,), torch.bfloat16)
    for rows in decoded[:whole].view(REPEATS, PERIOD).split(2**16):
        assert (rows == decoded_row).all()
    if extra:
        tail = quantize(row[0, :extra], "nf4", 64)
        assert_same(packed[whole // 2 :], tail.packed)
        assert_same(decoded[whole:], dequantize_4bit(tail, (extra,), torch.bfloat16))


@pytest.mark.parametrize("m", [1, 3])
def test_linear_and_dgrad(row: torch.Tensor, m: int) -> None:
    one = quantize(row, "nf4", 64)
    q = one._replace(packed=one.packed.repeat(REPEATS, 1), absmax=one.absmax.repeat(REPEATS, 1))
    x = normal(m, PERIOD, dtype=torch.bfloat16)
    y = ops.linear_4bit(x, *q, REPEATS, None)
    torch.testing.assert_close(y, ops.linear_4bit(x, *one, 1, None).expand_as(y))

    grad = torch.zeros(m, REPEATS, dtype=torch.bfloat16)
    grad[:, -1] = 1
    grad_x = ops.linear_4bit_dgrad(grad, *q, PERIOD)
    assert_same(grad_x, dequantize_4bit(one, (1, PERIOD), torch.bfloat16).expand(m, -1))
