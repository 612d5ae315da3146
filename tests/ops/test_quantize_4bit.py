from __future__ import annotations

import pytest
import reference
import torch
from cases import BLOCKSIZES, DTYPES, QUANT_TYPES, WEIGHT_CASES, WeightCase, normal
from reference import assert_same

quantize_4bit = torch.ops.qlora_ext.quantize_4bit


def check(weight: torch.Tensor, quant_type: str, blocksize: int) -> None:
    assert_same(quantize_4bit(weight, quant_type, blocksize), reference.quantize_4bit(weight, quant_type, blocksize))


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_bytes_equal_reference(case: WeightCase, cpu_path: str) -> None:
    check(torch.randn(case.shape).to(case.dtype), case.quant_type, case.blocksize)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_values_at_and_beside_every_bound(dtype: torch.dtype, quant_type: str, cpu_path: str) -> None:
    """A bound itself encodes to the lower value, the next float above it to the upper one."""
    table = reference.codebook(quant_type).sort().values
    exact = torch.cat([(table[:-1] + table[1:]) / 2, table, torch.tensor([0.0, -0.0, 1.0, -1.0])]).to(dtype)
    infinity = torch.tensor(torch.inf, dtype=dtype)
    weight = torch.cat([exact, exact.nextafter(infinity), exact.nextafter(-infinity)]).clamp(-1, 1)
    check(weight, quant_type, 128)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_absmax_over_the_whole_range_of_the_dtype(dtype: torch.dtype, quant_type: str, cpu_path: str) -> None:
    """Subnormal absmax (the divisor is at least 1e-38), subnormal reciprocals, the largest float."""
    largest = torch.finfo(dtype).max
    exponents = torch.linspace(-149, 127, 277)
    magnitudes = torch.cat([2.0**exponents, torch.tensor([1e-38, largest, 0.0])])
    weight = torch.rand(len(magnitudes), 64) * 2 - 1
    weight[:, 17] = 1
    check((weight * magnitudes[:, None]).clamp(-largest, largest).to(dtype), quant_type, 64)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize(("quant_type", "zero"), [("nf4", 0x77), ("fp4", 0x00)])
def test_all_zero_block_is_the_code_of_zero(quant_type: str, zero: int, blocksize: int, cpu_path: str) -> None:
    weight = torch.zeros(2, blocksize)
    weight[1].neg_()
    packed, absmax = quantize_4bit(weight, quant_type, blocksize)
    assert (packed == zero).all()
    assert (absmax == 0).all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_absmax_of_their_block_alone(
    bad: float, dtype: torch.dtype, quant_type: str, cpu_path: str
) -> None:
    for place in (64, 80, 127):
        weight = normal(3, 64, dtype=dtype)
        weight.view(-1)[place] = bad
        check(weight, quant_type, 64)
        assert quantize_4bit(weight, quant_type, 64)[1].isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_nan_has_the_same_code_whatever_its_bits(quant_type: str, cpu_path: str) -> None:
    weight = normal(3, 64)
    weight.view(torch.int32)[1, ::2] = 0x7FC00003 + torch.arange(32, dtype=torch.int32)
    check(weight, quant_type, 64)
    packed, _ = quantize_4bit(weight, quant_type, 64)
    weight[1, ::2] = torch.nan
    assert torch.equal(packed, quantize_4bit(weight, quant_type, 64)[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_non_contiguous_weight(dtype: torch.dtype, cpu_path: str) -> None:
    weight = normal(128, 192, dtype=dtype)
    for view in (weight.T, weight[:, ::3], weight[1:, 64:], weight[:1].expand(5, -1)):
        check(view, "nf4", 64)


BAD = {
    "weight-int": ((torch.zeros(64, dtype=torch.int32), "nf4", 64), TypeError, "weight: .*Int"),
    "weight-double": ((torch.zeros(64, dtype=torch.float64), "nf4", 64), TypeError, "weight: .*Double"),
    "quant-type": ((torch.zeros(64), "nf5", 64), ValueError, "quant_type: .*nf5"),
    "quant-type-case": ((torch.zeros(64), "NF4", 64), ValueError, "quant_type: .*NF4"),
} | {
    f"blocksize{blocksize}": ((torch.zeros(64), "nf4", blocksize), ValueError, f"blocksize: .*, got {blocksize}$")
    for blocksize in (-64, 0, 1, 16, 48, 8192)
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_errors(arguments: tuple[torch.Tensor, str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^quantize_4bit: {message}"):
        quantize_4bit(*arguments)


def test_a_tensor_without_values_gives_the_same_error() -> None:
    with pytest.raises(ValueError, match=r"^quantize_4bit: blocksize: .*, got 0$"):
        quantize_4bit(torch.zeros(64, device="meta"), "nf4", 0)


@pytest.mark.parametrize("shape", [(4, 64), (3, 33), (), (0, 64)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(quantize_4bit.default, (torch.randn(shape), "nf4", 64))
