"""The bytes of quantize_4bit's kernel, and the accesses it makes for them."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import BLOCKSIZES, DTYPES, QUANT_TYPES, WEIGHT_CASES, WeightCase, normal
from launcher import Device, under_schedules
from recorded_gpu import LaunchError
from reference import assert_same
from torch import Tensor


def expected(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, ...]:
    return tuple(tensor.flatten() for tensor in reference.quantize_4bit(weight, quant_type, blocksize))


def check(weight: Tensor, quant_type: str, blocksize: int, device: Device | None = None) -> None:
    device = device or Device()
    assert_same(device.quantize_4bit(weight, quant_type, blocksize), expected(weight, quant_type, blocksize))
    assert len(device.results) == (weight.numel() > 0)


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_bytes_equal_reference(case: WeightCase) -> None:
    check(torch.randn(case.shape).to(case.dtype), case.quant_type, case.blocksize)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_kind_with_a_ragged_end(dtype: torch.dtype, quant_type: str, blocksize: int) -> None:
    for tail in (1, 6, 9):  # of an odd byte, of less than a thread's 8 weights, of more
        check(normal(blocksize + tail, dtype=dtype), quant_type, blocksize)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_values_at_and_beside_every_bound(dtype: torch.dtype, quant_type: str) -> None:
    table = reference.codebook(quant_type).sort().values
    exact = torch.cat([(table[:-1] + table[1:]) / 2, table, torch.tensor([0.0, -0.0, 1.0, -1.0])]).to(dtype)
    infinity = torch.tensor(torch.inf, dtype=dtype)
    check(torch.cat([exact, exact.nextafter(infinity), exact.nextafter(-infinity)]).clamp(-1, 1), quant_type, 128)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_absmax_over_the_whole_range_of_the_dtype(dtype: torch.dtype, quant_type: str) -> None:
    """From subnormal ones to the largest float, and blocks of zeros of both signs."""
    largest = torch.finfo(dtype).max
    magnitudes = torch.cat([2.0 ** torch.linspace(-149, 127, 277), torch.tensor([1e-38, largest, 0.0, -0.0])])
    weight = torch.rand(len(magnitudes), 64) * 2 - 1
    weight[:, 17] = 1
    check((weight * magnitudes[:, None]).clamp(-largest, largest).to(dtype), quant_type, 64)


@pytest.mark.parametrize("blocksize", [32, 64, 256, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_and_inf_reach_absmax_of_their_block_alone(dtype: torch.dtype, blocksize: int) -> None:
    weight = normal(8, blocksize, dtype=dtype)
    weight[1, 0], weight[3, blocksize // 2 + 1], weight[5, -1] = torch.nan, torch.inf, -torch.inf
    weight[6, 3], weight[6, 7] = torch.inf, torch.nan
    for end in (8 * blocksize, 7 * blocksize - 5):  # the second ends in a block with a NaN, at an odd count
        check(weight.view(-1)[:end], "nf4", blocksize)


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_view_off_the_alignment_of_vector_loads(dtype: torch.dtype, offset: int) -> None:
    """offset: elements."""
    check(normal(5000, dtype=dtype), "nf4", 64, Device(offsets={"weight": offset * dtype.itemsize}))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_schedule_gives_the_same_bytes(dtype: torch.dtype, blocksize: int) -> None:
    weight = normal(9001, dtype=dtype)
    assert_same(
        under_schedules(lambda device: device.quantize_4bit(weight, "fp4", blocksize)),
        expected(weight, "fp4", blocksize),
    )


@pytest.mark.parametrize("first", [2**31, 2**32, 2**33 + 2**15])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_indices_over_32_bits(dtype: torch.dtype, first: int) -> None:
    """Of a weight too large to hold only the end is there, and only the last CTAs of the grid run."""
    weight = normal(2**14 + 33, dtype=dtype)
    assert_same(Device().quantize_4bit(weight, "nf4", 64, first=first), expected(weight, "nf4", 64))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_memory_traffic(dtype: torch.dtype) -> None:
    """Each byte read and written once, whole sectors written at once."""
    device = Device()
    device.quantize_4bit(normal(4, 4096, dtype=dtype), "nf4", 64)
    traffic = device.results[0].traffic
    assert (traffic["weight"].read.times == 1).all()
    for name in ("packed", "absmax"):
        assert (traffic[name].written.times == 1).all()
    assert traffic["packed"].written.sectors == traffic["packed"].written.compulsory_sectors
    assert traffic["absmax"].written.sectors <= 2 * traffic["absmax"].written.compulsory_sectors


def test_unknown_dtype_is_an_error_not_a_launch() -> None:
    device = Device()
    with pytest.raises(LaunchError, match="quantize_4bit: CUDA error 1"):
        device._call("quantize_4bit", 0, 3, 64, 64, 0, 0, 0)
    assert not device.results
