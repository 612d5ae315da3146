"""The bytes of quantize_absmax's kernels."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from launcher import Device, under_schedules
from reference import assert_same, codebook


def check(absmax: torch.Tensor, device: Device | None = None) -> None:
    assert_same((device or Device()).quantize_absmax(absmax), reference.quantize_absmax(absmax))


@pytest.mark.parametrize(
    "n", [0, 1, 255, 256, 257, 32 * 256 - 1, 32 * 256 + 1, 512 * 256 + 3, 1300 * 256 + 77], ids=lambda n: f"n{n}"
)
def test_bytes_equal_reference(n: int) -> None:
    """The borders are those of a group, of a CTA of the first kernel and of a tile of the second."""
    check(torch.rand(n))


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -60, 60, 127])
def test_absmax_over_the_whole_range(exponent: int) -> None:
    """Groups whose maximum is subnormal: its reciprocal would be infinite and is cut to the largest float."""
    check(torch.rand(3, 256).mul(2.0**exponent))


def test_values_at_and_beside_every_midpoint() -> None:
    """A tie goes to the lower code."""
    table = codebook("dynamic")
    midpoints = (table[:-1].double() + table[1:].double()).div(2).float()
    beside = [midpoints.nextafter(torch.tensor(far)) for far in (2.0, -2.0)]
    values = torch.cat([midpoints, *beside, table])
    # Mirrored, so that the mean is 0.0; every group of 256 holds a 1.0, so that x is the value itself.
    values = torch.cat([values, -values])
    groups = F.pad(values, (0, -len(values) % 254)).view(-1, 254)
    absmax = F.pad(F.pad(groups, (1, 0), value=1.0), (1, 0), value=-1.0)
    device = Device()
    assert device.quantize_absmax(absmax)[2] == 0
    check(absmax)


def test_offset_is_summed_in_fp64_in_order() -> None:
    """In fp32, or in another order, 2^60 would swallow other values than it does here."""
    absmax = torch.rand(200_000)
    absmax[300], absmax[900], absmax[199_000] = 2.0**60, -(2.0**60), 2.0**55
    check(absmax)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_as_on_the_cpu(bad: float) -> None:
    """They have no nearest code; functional.quantize_4bit refuses them."""
    absmax = torch.rand(700)
    absmax[300] = bad
    assert_same(Device().quantize_absmax(absmax), torch.ops.qlora_ext.quantize_absmax(absmax))


def test_group_without_spread_is_exact() -> None:
    check(torch.full((3, 256), 0.1))


def test_garbage_in_the_workspace_is_not_read() -> None:
    check(torch.rand(700), Device(workspace=0xFF))


def test_every_schedule_gives_the_same_bytes() -> None:
    absmax = torch.rand(33 * 256 + 5)
    assert_same(under_schedules(lambda device: device.quantize_absmax(absmax)), reference.quantize_absmax(absmax))


def test_memory_traffic_and_bank_conflicts() -> None:
    """Two reads of absmax, one write of the codes, and no conflict where a warp adds up its 32 groups."""
    device = Device()
    device.quantize_absmax(torch.rand(64 * 256))
    sums, _, codes = device.results
    for result in (sums, codes):
        assert (result.traffic["absmax"].read.times == 1).all()
        assert result.traffic["absmax"].read.sectors == result.traffic["absmax"].read.compulsory_sectors
    assert (codes.traffic["codes"].written.times == 1).all()
    assert codes.traffic["codes"].written.sectors == codes.traffic["codes"].written.compulsory_sectors
    assert max(site.degree for site in sums.banks) == 1
