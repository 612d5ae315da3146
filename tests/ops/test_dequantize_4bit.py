from __future__ import annotations

import pytest
import reference
import torch
from cases import DTYPES, QUANT_TYPES, WEIGHT_CASES, WeightCase, normal
from reference import Quantized, assert_same, quantize

dequantize_4bit = torch.ops.qlora_ext.dequantize_4bit


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=str)
def test_values_equal_reference(case: WeightCase, cpu_path: str) -> None:
    q = quantize(torch.randn(case.shape), case.quant_type, case.blocksize, case.double_quant)
    assert_same(dequantize_4bit(*q, case.shape, case.dtype), reference.dequantize_4bit(q, case.shape, case.dtype))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_byte_with_scales_of_every_magnitude(dtype: torch.dtype, quant_type: str, cpu_path: str) -> None:
    """Rounds to nearest even, into subnormals and to infinity; code 8 of FP4 is read though never written."""
    odd = torch.arange(1, 32, 2)
    ties = torch.cat([1 + odd * 2.0**-8, 1 + odd * 2.0**-11, odd * 2.0**-25])  # of bf16, fp16 and fp16's subnormals
    magnitudes = torch.rand(277) * 2.0 ** torch.linspace(-149, 127, 277)
    absmax = torch.cat([ties, magnitudes, torch.tensor([0.0, torch.inf, torch.nan])])
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(absmax), 1)
    q = Quantized(packed, absmax[:, None], None, None, quant_type, 512)
    shape = (len(absmax), 512)
    assert_same(dequantize_4bit(*q, shape, dtype), reference.dequantize_4bit(q, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_nested_code(dtype: torch.dtype, cpu_path: str) -> None:
    """The product is rounded before the offset is added: fused, some of these scales would differ."""
    packed = torch.randint(256, (512, 16), dtype=torch.uint8)
    absmax = torch.arange(512).to(torch.uint8)[:, None]
    q = Quantized(packed, absmax, torch.tensor([0.0123, 4.56]), torch.tensor(0.0345), "nf4", 32)
    assert_same(dequantize_4bit(*q, (512, 32), dtype), reference.dequantize_4bit(q, (512, 32), dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_requantizing_decoded_values_changes_nothing(dtype: torch.dtype) -> None:
    """Each code times its scale is nearest to itself, and the largest value of a block keeps its absmax."""
    q = quantize(normal(64, 256, dtype=dtype), "nf4", 64)
    again = torch.ops.qlora_ext.quantize_4bit(dequantize_4bit(*q, (64, 256), dtype), "nf4", 64)
    assert_same(again, (q.packed, q.absmax))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=hex)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_stays_nan_whatever_its_bits(dtype: torch.dtype, bits: int, cpu_path: str) -> None:
    weight = torch.randn(2, 64)
    weight.view(torch.int32)[1, 7] = bits
    packed, absmax = torch.ops.qlora_ext.quantize_4bit(weight, "nf4", 64)
    decoded = torch.ops.qlora_ext.dequantize_4bit(packed, absmax, None, None, "nf4", 64, (2, 64), dtype)
    assert decoded[0].isfinite().all()
    assert decoded[1].isnan().all()


def test_bad_shape_and_dtype() -> None:
    q = quantize(normal(8, 128), "nf4", 64)
    with pytest.raises(ValueError, match=r"^dequantize_4bit: packed: "):
        dequantize_4bit(*q, (8, 129), torch.float32)
    with pytest.raises(ValueError, match=r"^dequantize_4bit: shape: .*-8"):
        dequantize_4bit(*q, (-8, -128), torch.float32)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(TypeError, match=r"^dequantize_4bit: dtype: "):
            dequantize_4bit(*q, (8, 128), dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(4, 64), (3, 33), (0, 64)])
def test_opcheck(shape: tuple[int, ...], double_quant: bool) -> None:
    q = quantize(torch.randn(shape), "nf4", 64, double_quant)
    torch.library.opcheck(dequantize_4bit.default, (*q, shape, torch.bfloat16))
    torch.library.opcheck(dequantize_4bit.out, q, {"out": torch.empty(shape, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((-1, 64), r"shape: expected sizes of at least 0, got \[-1, 64\]"),
        ((1 << 32, 1 << 32), r"expected a weight of fewer than 2\^63 elements, got \[4294967296, 4294967296\]"),
    ],
    ids=["negative", "overflow"],
)
def test_shapes_that_no_weight_has(shape: tuple[int, int], message: str) -> None:
    """A product that wraps to 0 would pass for an empty weight."""
    with pytest.raises(ValueError, match=f"^dequantize_4bit: .*{message}"):
        torch.ops.qlora_ext.dequantize_4bit(*quantize(torch.empty(0, 64), "nf4", 64), shape, torch.float32)
