"""The values of dequantize_4bit's kernel, whole and in slices, and the accesses it makes for them."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import BLOCKSIZES, DTYPES, QUANT_TYPES, WEIGHT_CASES, WeightCase, normal
from launcher import Device, under_schedules
from reference import Quantized, assert_same, quantize

# (shape, rows, columns): odd borders, odd row lengths, blocks that cross rows, slices within a byte.
SLICES = {
    "rows": ((6, 256), (2, 5), (0, 256)),
    "columns": ((6, 256), (0, 6), (64, 192)),
    "odd-columns": ((6, 256), (1, 4), (3, 250)),
    "one-column": ((40, 64), (0, 40), (63, 64)),
    "one-element": ((3, 64), (1, 2), (9, 10)),
    "odd-rows": ((7, 33), (1, 6), (0, 33)),
    "odd-rows-odd-columns": ((7, 33), (3, 7), (5, 32)),
    "rows-that-end-within-a-group": ((7, 36), (2, 5), (0, 36)),
    "rows-not-blocks": ((3, 4304), (1, 3), (8, 4296)),
    "column-of-aligned-groups": ((3, 4304), (0, 3), (2152, 4304)),
    "no-rows": ((3, 64), (1, 1), (0, 64)),
    "no-columns": ((3, 64), (0, 3), (64, 64)),
}


def check(
    q: Quantized,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    device: Device | None = None,
) -> None:
    device, rows, columns = device or Device(), rows or (0, shape[0]), columns or (0, shape[1])
    weight = reference.dequantize_4bit(q, shape, dtype)
    out = device.dequantize_4bit(q, shape[1], rows, columns, dtype)
    assert_same(out, weight[slice(*rows), slice(*columns)])
    assert len(device.results) == (out.numel() > 0)


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_values_equal_reference(case: WeightCase) -> None:
    q = quantize(torch.randn(case.shape), case.quant_type, case.blocksize, case.double_quant)
    shape = torch.Size(case.shape)
    columns = shape[-1] if shape else 1
    check(q, (shape.numel() // max(columns, 1), columns), case.dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["fp32", "dq"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_kind_with_a_ragged_end(quant_type: str, blocksize: int, double_quant: bool) -> None:
    for tail, dtype in zip((1, 3, 6), DTYPES.values(), strict=True):
        n = blocksize + tail
        check(quantize(normal(n), quant_type, blocksize, double_quant), (1, n), dtype)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_byte_with_scales_of_every_magnitude(dtype: torch.dtype, quant_type: str) -> None:
    """Rounds to nearest even, into subnormals and to infinity; code 8 of FP4 is read though never written."""
    odd = torch.arange(1, 32, 2)
    ties = torch.cat([1 + odd * 2.0**-8, 1 + odd * 2.0**-11, odd * 2.0**-25])  # of bf16, fp16 and fp16's subnormals
    magnitudes = torch.rand(277) * 2.0 ** torch.linspace(-149, 127, 277)
    absmax = torch.cat([ties, magnitudes, torch.tensor([0.0, torch.inf, torch.nan])])
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(absmax), 1)
    check(Quantized(packed, absmax[:, None], None, None, quant_type, 512), (len(absmax), 512), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_nested_code(dtype: torch.dtype) -> None:
    """The product is rounded before the offset is added: fused, some of these scales would differ."""
    packed = torch.randint(256, (512, 16), dtype=torch.uint8)
    absmax = torch.arange(512).to(torch.uint8)[:, None]
    check(Quantized(packed, absmax, torch.tensor([0.0123, 4.56]), torch.tensor(0.0345), "nf4", 32), (512, 32), dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["fp32", "dq"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", SLICES)
def test_slice(name: str, dtype: torch.dtype, double_quant: bool) -> None:
    shape, rows, columns = SLICES[name]
    check(quantize(normal(*shape), "nf4", 32, double_quant), shape, dtype, rows, columns)


@pytest.mark.parametrize("offsets", [{"packed": 1}, {"packed": 2}, {"out": 4}, {"absmax": 4}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_view_off_the_alignment_of_vector_accesses(dtype: torch.dtype, offsets: dict[str, int]) -> None:
    check(quantize(normal(5, 256), "nf4", 64, False), (5, 256), dtype, device=Device(offsets=offsets))


@pytest.mark.parametrize("name", ["rows", "odd-columns"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_schedule_gives_the_same_bytes(dtype: torch.dtype, name: str) -> None:
    shape, rows, columns = SLICES[name]
    q = quantize(normal(*shape), "fp4", 64, True)
    out = under_schedules(lambda device: device.dequantize_4bit(q, shape[1], rows, columns, dtype))
    assert_same(out, reference.dequantize_4bit(q, shape, dtype)[slice(*rows), slice(*columns)])


@pytest.mark.parametrize("columns", [(0, 4096), (1, 4000)], ids=["whole-rows", "columns"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["fp32", "dq"])
@pytest.mark.parametrize("first_row", [2**19, 2**20, 2**21 + 16], ids=lambda first_row: f"row{first_row}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_indices_over_32_bits(dtype: torch.dtype, first_row: int, double_quant: bool, columns: tuple[int, int]) -> None:
    """Of a weight of 2^31 elements and more only the last rows are there."""
    q = quantize(normal(4, 4096), "nf4", 64, double_quant)
    rows = (first_row + 1, first_row + 4)
    out = Device().dequantize_4bit(q, 4096, rows, columns, dtype, first_row=first_row)
    assert_same(out, reference.dequantize_4bit(q, (4, 4096), dtype)[1:, slice(*columns)])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_memory_traffic(dtype: torch.dtype) -> None:
    """Each packed byte read once and each value written once, in whole sectors; one launch, no temporary."""
    device = Device()
    check(quantize(normal(8, 4096), "nf4", 64, True), (8, 4096), dtype, device=device)
    [result] = device.results
    packed, out = result.traffic["packed"].read, result.traffic["out"].written
    for flow in (packed, out):
        assert (flow.times == 1).all()
    assert out.sectors == out.compulsory_sectors
    assert packed.sectors == packed.compulsory_sectors
