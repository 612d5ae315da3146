"""How far a result is from the right one, in the units that the benches record."""

from __future__ import annotations

import torch
from torch import Tensor

CHECKED_ROWS = 64  # of a product: its fp64 twin would take longer than the bench
OTHER_FORMAT = 0.25  # a peer's 4-bit format rounds differently, to about a tenth; past this it computes something else


def of_bound(exact: Tensor, torch_result: Tensor, got: Tensor) -> float:
    """max|got - exact| as a fraction of twice that of plain torch and a unit in the last place."""
    last_place = torch.finfo(torch_result.dtype).eps * exact.abs().max()
    bound = 2 * (torch_result.double() - exact).abs().max() + last_place
    return float((got.double() - exact).abs().max() / bound)


def differing(expected: Tensor, got: Tensor) -> float:
    """The fraction of values that are not equal."""
    return float((got.reshape(-1) != expected.to(got.device).reshape(-1)).double().mean())


def distance(expected: Tensor, got: Tensor) -> float:
    """The root of the mean squared difference, as a fraction of that of the expected values."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm())


def checked_rows(rows: int) -> Tensor:
    """Which rows of a product are compared: evenly spread, the first and the last among them."""
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).long()
