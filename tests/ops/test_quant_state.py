"""QuantState: what it takes, and that it passes through torch.compile and torch.save."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from cases import normal
from reference import assert_same
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qlora_ext import QuantState, dequantize_4bit, linear_4bit, quantize_4bit

PACKED, STATE = quantize_4bit(normal(96, 128))
X = normal(3, 128)


@pytest.mark.parametrize("shape", [[96, 128], (96, 128)], ids=["list", "tuple"])
def test_a_shape_from_elsewhere_becomes_a_size(shape: Any) -> None:
    state = dataclasses.replace(STATE, shape=shape)
    assert isinstance(state.shape, torch.Size)
    expected, out = dequantize_4bit(PACKED, STATE), torch.zeros(96, 128)
    assert_same(dequantize_4bit(PACKED, state, out=out), expected)
    assert_same(out, expected)
    assert_same(linear_4bit(X, PACKED, state.to("cpu")), linear_4bit(X, PACKED, STATE))


WRONG = {
    "shape": (None, 96, "96", [96, "128"], torch.ones(2)),
    "dtype": (None, "float32"),
    "quant_type": (None, 4),
    "blocksize": (None, 64.0),
    "absmax": (None, [1.0]),
    "nested_absmax": ([1.0],),
    "nested_offset": (0.0,),
}


@pytest.mark.parametrize(("what", "value"), [(what, value) for what, values in WRONG.items() for value in values])
def test_another_type_is_named(what: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"QuantState: {what}: expected .*got "):
        dataclasses.replace(STATE, **{what: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_is_made_in_a_compiled_function(dynamic: bool) -> None:
    def decode(packed: Tensor, absmax: Tensor, like: Tensor) -> Tensor:
        as_size = QuantState(like.shape, torch.float32, "nf4", 64, absmax)
        as_list = QuantState([like.shape[0], like.shape[1]], torch.float32, "nf4", 64, absmax)  # type: ignore[arg-type]
        return dequantize_4bit(packed, as_size) + dequantize_4bit(packed, as_list)

    torch._dynamo.reset()
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (96, 32):
        weight = normal(rows, 128)
        packed, state = quantize_4bit(weight, double_quant=False)
        assert_same(compiled(packed, state.absmax, weight), 2 * dequantize_4bit(packed, state))


def test_a_shape_may_be_symbolic() -> None:
    def decode(packed: Tensor, absmax: Tensor, like: Tensor) -> Tensor:
        rows, columns = like.shape
        return dequantize_4bit(packed, QuantState((rows, columns), torch.float32, "nf4", 64, absmax))  # type: ignore[arg-type]

    packed, state = quantize_4bit(normal(96, 128), double_quant=False)
    traced = make_fx(decode, tracing_mode="symbolic")(packed, state.absmax, normal(96, 128))
    assert_same(traced(packed, state.absmax, normal(96, 128)), dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_all_its_tensors_move(double_quant: bool) -> None:
    before = quantize_4bit(normal(96, 128), double_quant=double_quant)[1]
    state = before.to("meta")
    assert (state.shape, state.dtype, state.double_quant) == (before.shape, before.dtype, double_quant)
    tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * (3 if double_quant else 1)


def test_torch_load_reads_one_with_weights_only() -> None:
    file = io.BytesIO()
    torch.save((PACKED, STATE), file)
    file.seek(0)
    packed, state = torch.load(file, weights_only=True)
    assert_same(dequantize_4bit(packed, state), dequantize_4bit(PACKED, STATE))
    assert type(state.shape) is torch.Size
    for name in ("shape", "dtype", "quant_type", "blocksize"):
        assert getattr(state, name) == getattr(STATE, name), name
