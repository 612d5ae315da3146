"""The public functions quantize_4bit, dequantize_4bit and linear_4bit, and QuantState."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from cases import BLOCKSIZES, DTYPES, QUANT_TYPES, normal
from reference import Quantized, assert_same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import qlora_ext


def as_quantized(packed: torch.Tensor, state: qlora_ext.QuantState) -> Quantized:
    return Quantized(packed, state.absmax, state.nested_absmax, state.nested_offset, state.quant_type, state.blocksize)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_round_trip_equals_reference(quant_type: str, blocksize: int, double_quant: bool) -> None:
    weight = torch.randn(3, 8192, dtype=torch.bfloat16)
    packed, state = qlora_ext.quantize_4bit(
        weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
    )
    expected = reference.quantize(weight, quant_type, blocksize, double_quant)
    for got, same in zip(as_quantized(packed, state), expected, strict=True):
        if isinstance(same, torch.Tensor):
            assert_same(got, same)
        else:
            assert got == same
    assert (state.shape, state.dtype) == (weight.shape, weight.dtype)
    for dtype in (None, *DTYPES.values()):
        decoded = qlora_ext.dequantize_4bit(packed, state, dtype)
        assert_same(decoded, reference.dequantize_4bit(expected, (3, 8192), dtype or torch.bfloat16))


def test_defaults_are_nf4_in_blocks_of_64_with_double_quantization() -> None:
    _, state = qlora_ext.quantize_4bit(torch.randn(4, 128))
    assert (state.quant_type, state.blocksize, state.double_quant) == ("nf4", 64, True)


def test_blocks_of_64_with_double_quantization_take_4127_thousandths_of_a_bit() -> None:
    packed, state = qlora_ext.quantize_4bit(torch.randn(1024, 1024))
    tensors = [packed, state.absmax, state.nested_absmax, state.nested_offset]
    assert sum(8 * tensor.nbytes for tensor in tensors) / 1024**2 == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256), abs=1e-4
    )


def mean_error_of_normal_values(quant_type: str, blocksize: int) -> float:
    """Mean |error| over N(0, 1), by integration over the block's absmax m and over its other values u * m.

    Given m, these are normal within [-m, m]; the value that holds the absmax has no error.
    """
    m = torch.linspace(0.01, 7, 700, dtype=torch.float64)[:, None]
    u = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    below = torch.erf(m / 2**0.5)
    absmax_density = blocksize * below ** (blocksize - 1) * torch.exp(-(m**2) / 2)
    value_density = torch.exp(-((m * u) ** 2) / 2)
    error = m * (u - reference.codebook(quant_type).double()[reference.encode(u, quant_type)]).abs()
    given_m = (error * value_density).sum(1, keepdim=True) / value_density.sum(1, keepdim=True)
    return float((given_m * absmax_density).sum() / absmax_density.sum() * (blocksize - 1) / blocksize)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_mean_quantization_error(quant_type: str, blocksize: int) -> None:
    """The mean of 2^22 values deviates by some 0.2 %, as blocks of 4096 have but 1024 scales."""
    expected = mean_error_of_normal_values(quant_type, blocksize)
    for dtype in DTYPES.values():
        weight = torch.randn(2048, 2048).to(dtype)
        packed, state = qlora_ext.quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize, double_quant=False)
        error = (qlora_ext.dequantize_4bit(packed, state, torch.float32) - weight.float()).abs().mean()
        assert float(error) == pytest.approx(expected, rel=0.01), dtype


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_is_the_op_with_the_fields_of_the_state(dtype: torch.dtype, bias: bool) -> None:
    packed, state = qlora_ext.quantize_4bit(torch.randn(48, 256))
    q = as_quantized(packed, state)
    x = torch.randn(3, 256).to(dtype).requires_grad_()
    b = torch.randn(48).to(dtype).requires_grad_() if bias else None
    y = qlora_ext.linear_4bit(x, packed, state, b)
    assert_same(y, torch.ops.qlora_ext.linear_4bit(x, *q, 48, b))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert_same(x.grad, torch.ops.qlora_ext.linear_4bit_dgrad(grad, *q, 256))
    assert b is None or b.grad is not None


def test_eval_and_train_alternate() -> None:
    packed, state = qlora_ext.quantize_4bit(torch.randn(48, 256))
    x = torch.randn(1, 256)
    with torch.no_grad():
        before = qlora_ext.linear_4bit(x, packed, state)
    x.requires_grad_()
    y = qlora_ext.linear_4bit(x, packed, state)
    assert_same(y, before)
    y.sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        assert_same(qlora_ext.linear_4bit(x, packed, state), before)


def test_a_copy_on_write_weight_is_not_copied() -> None:
    packed, state = qlora_ext.quantize_4bit(torch.randn(48, 256))
    lazy = [torch._lazy_clone(t) for t in (packed, state.absmax)]
    qlora_ext.linear_4bit(torch.randn(3, 256), lazy[0], dataclasses.replace(state, absmax=lazy[1]))
    assert all(torch._C._is_cow_tensor(t) for t in lazy)


def test_linear_under_autocast_is_in_its_dtype() -> None:
    packed, state = qlora_ext.quantize_4bit(torch.randn(48, 256))
    x, bias = torch.randn(3, 256), torch.randn(48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = qlora_ext.linear_4bit(x, packed, state, bias)
    assert_same(y, qlora_ext.linear_4bit(x.bfloat16(), packed, state, bias))


@pytest.mark.parametrize("double_quant", [False, True])
def test_of_a_parameter_nothing_wants_a_gradient(double_quant: bool) -> None:
    packed, state = qlora_ext.quantize_4bit(nn.Parameter(torch.randn(4, 64)), double_quant=double_quant)
    assert not any(t.requires_grad for t in as_quantized(packed, state) if isinstance(t, torch.Tensor))


def test_state_is_frozen() -> None:
    _, state = qlora_ext.quantize_4bit(torch.randn(4, 64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.blocksize = 128  # type: ignore[misc]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("double_quant", [False, True])
def test_weight_that_is_not_finite(double_quant: bool, bad: float) -> None:
    weight = normal(4, 64)
    weight[2, 3] = bad
    message = r"quantize_4bit: weight: expected finite .* in 1 of 4 blocks of 64, the first at element 128$"
    with pytest.raises(ValueError, match=message):
        qlora_ext.quantize_4bit(weight, double_quant=double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
def test_no_values_are_asked_for_where_there_are_none(double_quant: bool) -> None:
    real = qlora_ext.quantize_4bit(normal(4, 64), double_quant=double_quant)
    with FakeTensorMode():
        packed, state = qlora_ext.quantize_4bit(torch.empty(4, 64), double_quant=double_quant)
        model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 8)), double_quant=double_quant)
        assert model(torch.empty(3, 64)).shape == (3, 8)
    for fake, same in zip(as_quantized(packed, state), as_quantized(*real), strict=True):
        if isinstance(same, torch.Tensor):
            assert isinstance(fake, FakeTensor)
            assert (fake.shape, fake.dtype) == (same.shape, same.dtype)
        else:
            assert fake == same


def quantized() -> tuple[torch.Tensor, qlora_ext.QuantState]:
    return qlora_ext.quantize_4bit(normal(8, 128))


def with_wrong_state(**changes: object) -> torch.Tensor:
    packed, state = quantized()
    return qlora_ext.dequantize_4bit(packed, dataclasses.replace(state, **changes))


BAD = {
    "weight-type": (lambda: qlora_ext.quantize_4bit([[1.0, 2.0]]), TypeError, "weight.*list"),
    "weight-dtype": (
        lambda: qlora_ext.quantize_4bit(torch.ones(64).long()),
        TypeError,
        "quantize_4bit.*weight",
    ),
    "quant-type": (
        lambda: qlora_ext.quantize_4bit(normal(64), quant_type="int4"),
        ValueError,
        "quant_type.*int4",
    ),
    "blocksize": (lambda: qlora_ext.quantize_4bit(normal(64), blocksize=100), ValueError, "blocksize.*100"),
    "state-shape": (lambda: with_wrong_state(shape=torch.Size((8, 129))), ValueError, "packed"),
    "state-blocksize": (lambda: with_wrong_state(blocksize=128), ValueError, "absmax"),
    "state-quant-type": (lambda: with_wrong_state(quant_type="int4"), ValueError, "quant_type.*int4"),
    "state-nested": (lambda: with_wrong_state(nested_offset=None), ValueError, "nested_offset"),
    "dtype": (
        lambda: qlora_ext.dequantize_4bit(*quantized(), torch.float64),
        TypeError,
        "dequantize_4bit.*dtype",
    ),
    "packed-dtype": (
        lambda: qlora_ext.dequantize_4bit(quantized()[0].long(), quantized()[1]),
        TypeError,
        "packed.*uint8",
    ),
    "linear-x": (
        lambda: qlora_ext.linear_4bit(normal(3, 127), *quantized()),
        ValueError,
        "linear_4bit.*x.*127",
    ),
    "linear-bias": (
        lambda: qlora_ext.linear_4bit(normal(3, 128), *quantized(), normal(9)),
        ValueError,
        "linear_4bit.*bias.*9",
    ),
    "blocksize-type": (lambda: qlora_ext.quantize_4bit(normal(64), blocksize="64"), TypeError, "blocksize.*int.*str"),
    "quant-type-type": (lambda: qlora_ext.quantize_4bit(normal(64), quant_type=4), TypeError, "quant_type.*str.*int"),
    "dtype-type": (lambda: qlora_ext.dequantize_4bit(*quantized(), "float16"), TypeError, "dtype.*torch.dtype.*str"),
    "linear-bias-type": (
        lambda: qlora_ext.linear_4bit(normal(3, 128), *quantized(), [0.0] * 8),
        TypeError,
        "linear_4bit.*bias.*Tensor.*list",
    ),
    "packed-transposed": (
        lambda: qlora_ext.linear_4bit(normal(3, 128), quantized()[0].t(), quantized()[1]),
        ValueError,
        r"linear_4bit: packed: expected a contiguous tensor or rows of 64, got \[64, 8\]",
    ),
    "absmax-transposed": (
        lambda: with_wrong_state(absmax=quantized()[1].absmax.t()),
        ValueError,
        r"dequantize_4bit: absmax: expected a contiguous tensor or rows of 2",
    ),
    "linear-vector": (
        lambda: qlora_ext.linear_4bit(normal(3, 128), *qlora_ext.quantize_4bit(normal(128))),
        ValueError,
        "linear_4bit.*shape",
    ),
}


@pytest.mark.parametrize(("bad_call", "error", "message"), BAD.values(), ids=BAD)
def test_errors(bad_call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bad_call()


def test_weights_of_any_shape_in_order_are_read() -> None:
    """Flat, in a column as bitsandbytes has them, in a row as its matmul_4bit takes them, or some columns of rows."""
    packed, state = quantized()
    expected = qlora_ext.dequantize_4bit(packed, state)
    columns = torch.zeros(8, 100, dtype=torch.uint8)[:, 10:74]
    for same in (
        packed.flatten(),
        packed.view(-1, 1),
        packed.view(-1, 1).t(),
        packed.view(16, 32),
        columns.copy_(packed),
    ):
        assert qlora_ext.dequantize_4bit(same, state).equal(expected)
    for shape in ((1024,), (4, 256), (2, 4, 128)):
        viewed = qlora_ext.dequantize_4bit(packed, dataclasses.replace(state, shape=torch.Size(shape)))
        assert viewed.equal(expected.view(shape))


def mapping_flags(address: int) -> list[str]:
    """Of the mapping with this address, in /proc/self/smaps."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping has {address:#x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages")
def test_large_results_but_of_products_ask_for_huge_pages() -> None:
    """ "hg": madvise(MADV_HUGEPAGE), whatever the system then does."""
    packed, state = qlora_ext.quantize_4bit(torch.randn(4096, 4096))
    weight = qlora_ext.dequantize_4bit(packed, state)
    assert all("hg" in mapping_flags(tensor.data_ptr() + 2**22) for tensor in (packed, weight))
    product = qlora_ext.linear_4bit(torch.ones(1024, 64), *qlora_ext.quantize_4bit(torch.randn(2**14, 64)))
    assert "hg" not in mapping_flags(product.data_ptr() + 2**22), "64 MB: a mapping of its own"


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"quantize_4bit: weight: expected a torch\.Tensor, got list"):
        qlora_ext.quantize_4bit([1.0, 2.0])  # type: ignore[arg-type]
    packed, state = qlora_ext.quantize_4bit(torch.randn(64, 64))
    with pytest.raises(TypeError, match=r"linear_4bit: packed: expected a torch\.Tensor, got list"):
        qlora_ext.linear_4bit(torch.randn(3, 64), packed.tolist(), state)
    with pytest.raises(ValueError, match=r"linear_4bit: x: expected \[\.\.\., 64\], got \[\]"):
        qlora_ext.linear_4bit(torch.tensor(1.0), packed, state)
