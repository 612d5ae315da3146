from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_same, codebook

quantize_absmax = torch.ops.qlora_ext.quantize_absmax


def check(absmax: torch.Tensor) -> None:
    assert_same(quantize_absmax(absmax), reference.quantize_absmax(absmax))


@pytest.mark.parametrize("shape", [(1000, 64), (3, 1001), (2, 3, 128), (256,), (257,), (2047,), (1,), (), (0,), (0, 4)])
def test_bytes_equal_reference(shape: tuple[int, ...], cpu_path: str) -> None:
    check(torch.rand(shape))


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -60, 60, 127])
def test_absmax_over_the_whole_range(exponent: int, cpu_path: str) -> None:
    """Groups whose maximum is subnormal: its reciprocal would be infinite and is cut to the largest float."""
    check(torch.rand(3, 256).mul(2.0**exponent))


def test_values_at_and_beside_every_midpoint(cpu_path: str) -> None:
    """The nearest code in exact arithmetic: a tie goes to the lower index."""
    table = codebook("dynamic")
    midpoints = (table[:-1].double() + table[1:].double()).div(2).float()
    values = torch.cat(
        [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0)), table]
    )
    # Mirrored, so that the mean is 0.0; every group of 256 holds a 1.0, so that x is the value itself.
    values = torch.cat([values, -values])
    groups = F.pad(values, (0, -len(values) % 254)).view(-1, 254)
    absmax = F.pad(F.pad(groups, (1, 0), value=1.0), (1, 0), value=-1.0)
    assert quantize_absmax(absmax)[2] == 0
    check(absmax)


def test_group_without_spread_is_exact(cpu_path: str) -> None:
    absmax = torch.full((3, 256), 0.1)
    codes, nested_absmax, nested_offset = quantize_absmax(absmax)
    assert (codes == 127).all()
    assert (nested_absmax == 0).all()
    assert nested_offset == absmax[0, 0]


@pytest.mark.parametrize("n", [1024, 4096])
@pytest.mark.parametrize("places", [(300, 400), (300, 900)], ids=["one-group", "two-groups"])
def test_offset_is_summed_in_fp64_in_order(places: tuple[int, int], n: int, cpu_path: str) -> None:
    """In fp32, or in another order, 2^60 would swallow other values than it does here."""
    absmax = torch.rand(n, dtype=torch.float32)
    absmax[list(places)] = torch.tensor([2.0**60, -(2.0**60)])
    check(absmax)


def test_nan_reaches_every_scale(cpu_path: str) -> None:
    """By the offset, the mean of all."""
    absmax = torch.rand(600)
    absmax[3] = torch.nan
    _, nested_absmax, offset = torch.ops.qlora_ext.quantize_absmax(absmax)
    assert offset.isnan()
    assert nested_absmax.isnan().all()


def test_non_contiguous_absmax(cpu_path: str) -> None:
    absmax = torch.rand(300, 40)
    for view in (absmax.T, absmax[:, ::3], absmax[:1].expand(5, -1)):
        check(view)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_wrong_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"quantize_absmax.*absmax.*float32"):
        quantize_absmax(torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4, 64), (3, 101), (), (0, 4)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(quantize_absmax.default, (torch.rand(shape),))
