"""dequantize_4bit(..., out=tensor): writes there what it would return, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import DTYPES
from reference import assert_same
from torch import Tensor

from qlora_ext import QuantState, dequantize_4bit, quantize_4bit


def quantized(*shape: int) -> tuple[Tensor, QuantState]:
    return quantize_4bit(torch.randn(shape))


@pytest.mark.parametrize("shape", [(4, 128), (3, 33), (2, 3, 64), (0, 64), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_same_values_and_nothing_beyond(dtype: torch.dtype, shape: tuple[int, ...], cpu_path: str) -> None:
    q = quantized(*shape)
    expected = dequantize_4bit(*q, dtype)
    memory = torch.full((expected.numel() + 128,), 7, dtype=dtype)
    for begin in (0, 1, 64):
        memory.fill_(7)
        out = memory[begin : begin + expected.numel()].view(shape)
        assert dequantize_4bit(*q, out=out) is out
        assert_same(out, expected)
        assert memory.ne(7).sum() <= expected.ne(7).sum()
        assert dequantize_4bit(*q, dtype, out=out) is out


def test_whoever_saved_out_for_backward_is_told() -> None:
    q = quantized(4, 64)
    factor = torch.ones(4, 64)
    product = torch.ones(4, 64, requires_grad=True) * factor
    dequantize_4bit(*q, out=factor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_parameter_without_grad_mode() -> None:
    q = quantized(4, 64)
    parameter = torch.nn.Parameter(torch.zeros(4, 64))
    with torch.no_grad():
        dequantize_4bit(*q, out=parameter)
    assert_same(parameter.detach(), dequantize_4bit(*q))


def test_compiled() -> None:
    q = quantized(4, 64)

    def twice(out: Tensor) -> Tensor:
        dequantize_4bit(*q, out=out)
        return out * 2

    out = torch.zeros(4, 64)
    twice_as_much = torch.compile(twice, backend="aot_eager", fullgraph=True)(out)
    assert_same(out, dequantize_4bit(*q))
    assert_same(twice_as_much, out * 2)


@pytest.mark.parametrize("negate", [torch._neg_view, lambda t: torch.complex(t, t).conj().imag], ids=["neg", "conj"])
def test_a_negated_view_is_refused(negate: Callable[[Tensor], Tensor]) -> None:
    q = quantized(4, 64)
    expected = dequantize_4bit(*q)
    for _ in range(20):  # what is left on torch's stack would end the process
        with pytest.raises(ValueError, match=r"^dequantize_4bit: out: expected "):
            dequantize_4bit(*q, out=negate(torch.zeros(4, 64)))
        out = torch.zeros(4, 64)
        dequantize_4bit(*q, out=out)
        assert_same(out, expected)


@pytest.mark.parametrize("name", ["packed", "absmax", "nested_absmax", "nested_offset"])
def test_memory_that_is_read_is_refused(name: str) -> None:
    packed, state = quantized(256, 256)
    memory = torch.empty(256 * 256, dtype=torch.float32)
    read = packed if name == "packed" else getattr(state, name)
    inside = memory.view(torch.uint8)[-read.nbytes :].view(read.dtype).view(read.shape)
    inside.copy_(read)
    if name != "packed":
        state = replace(state, **{name: inside})
    with pytest.raises(ValueError, match="out: expected memory of its own, got some of what is read"):
        dequantize_4bit(inside if name == "packed" else packed, state, out=memory.view(256, 256))
    assert torch.equal(inside, read)


def test_a_negated_view_is_not_read_as_what_it_negates() -> None:
    packed, absmax = torch.ops.qlora_ext.quantize_4bit(torch.randn(4, 64), "nf4", 64)
    negated = torch._neg_view(absmax)
    with pytest.raises(ValueError, match="negated view"):
        torch.ops.qlora_ext.dequantize_4bit.out(packed, negated, None, None, "nf4", 64, out=torch.zeros(4, 64))


def test_a_large_result_at_an_odd_address(cpu_path: str) -> None:
    """Which past the caches is written by whole vectors, where they are aligned."""
    q = quantized(1 << 24)
    memory = torch.empty((1 << 24) + 1)
    dequantize_4bit(*q, out=memory[1:])
    assert torch.equal(memory[1:], dequantize_4bit(*q))


ERRORS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "type": (lambda: [0.0], TypeError, "a torch.Tensor, got list"),
    "shape": (lambda: torch.empty(64, 4), ValueError, r"shape \[4, 64\], got \[64, 4\]"),
    "dtype": (
        lambda: torch.empty(4, 64, dtype=torch.float64),
        TypeError,
        "dtype float32, float16 or bfloat16, got Dou",
    ),
    "device": (lambda: torch.empty(4, 64, device="meta"), ValueError, "device cpu, got meta"),
    "strides": (lambda: torch.empty(64, 4).T, ValueError, r"a contiguous tensor, got strides \[1, 4\]"),
    "grad": (lambda: torch.empty(4, 64, requires_grad=True), ValueError, "a tensor that wants no gradient"),
}


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^dequantize_4bit: out: expected {message}"):
        dequantize_4bit(*quantized(4, 64), out=make())


def test_two_dtypes() -> None:
    with pytest.raises(TypeError, match=r"^dequantize_4bit: out: expected dtype torch.float16, got torch.float32"):
        dequantize_4bit(*quantized(4, 64), torch.float16, out=torch.empty(4, 64))
