"""The checks of the arguments Q, which are the same for every op that reads a quantized weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import normal
from reference import Quantized, assert_same, quantize
from torch import Tensor

ops = torch.ops.qlora_ext

# Each op on a weight of 8 x 128.
CALLS: dict[str, Callable[[Quantized], Tensor | tuple[Tensor, Tensor]]] = {
    "dequantize_4bit": lambda q: ops.dequantize_4bit(*q, (8, 128), torch.float32),
    "linear_4bit": lambda q: ops.linear_4bit(normal(3, 128), *q, 8, None),
    "linear_4bit_dgrad": lambda q: ops.linear_4bit_dgrad(normal(3, 8), *q, 128),
    "lora_linear_4bit": lambda q: ops.lora_linear_4bit(
        normal(3, 128), *q, 8, None, [normal(2, 128)], [normal(8, 2)], [0.5], [], None
    ),
    "experts_4bit": lambda q: ops.experts_4bit(normal(3, 128), *q, torch.tensor([3]), 8, False),
    "lora_experts_4bit": lambda q: ops.lora_experts_4bit(
        normal(3, 8), *q, torch.tensor([3]), 128, True, [normal(1, 2, 8)], [normal(1, 128, 2)], [0.5]
    ),
}
every_op = pytest.mark.parametrize("op", CALLS)

SINGLE = quantize(normal(8, 128), "nf4", 64)
DOUBLE = quantize(normal(8, 128), "nf4", 64, double_quant=True)
assert DOUBLE.nested_absmax is not None
assert DOUBLE.nested_offset is not None
# One row a check: (Q, the error, what its message must name)
BAD = {
    "packed-dtype": (SINGLE._replace(packed=SINGLE.packed.int()), TypeError, "packed: .*uint8"),
    "packed-size": (SINGLE._replace(packed=SINGLE.packed[1:]), ValueError, "packed: .*512.*448"),
    "packed-device": (SINGLE._replace(packed=SINGLE.packed.to("meta")), ValueError, ".*meta"),
    "absmax-dtype": (SINGLE._replace(absmax=SINGLE.absmax.half()), TypeError, "absmax: .*float32"),
    "absmax-size": (SINGLE._replace(absmax=SINGLE.absmax[1:]), ValueError, "absmax: .*16.*14"),
    "absmax-device": (SINGLE._replace(absmax=SINGLE.absmax.to("meta")), ValueError, "absmax: .*cpu.*meta"),
    "absmax-codes-alone": (
        DOUBLE._replace(nested_absmax=None, nested_offset=None),
        TypeError,
        "absmax: .*float32",
    ),
    "absmax-not-codes": (DOUBLE._replace(absmax=SINGLE.absmax), TypeError, "absmax: .*uint8"),
    "nested-absmax-alone": (DOUBLE._replace(nested_offset=None), ValueError, "nested_offset: "),
    "nested-offset-alone": (DOUBLE._replace(nested_absmax=None), ValueError, "nested_offset: .*nested_absmax"),
    "nested-absmax-dtype": (
        DOUBLE._replace(nested_absmax=DOUBLE.nested_absmax.double()),
        TypeError,
        "nested_absmax: .*float32",
    ),
    "nested-absmax-size": (DOUBLE._replace(nested_absmax=torch.ones(2)), ValueError, "nested_absmax: .*1.*2"),
    "nested-absmax-device": (
        DOUBLE._replace(nested_absmax=DOUBLE.nested_absmax.to("meta")),
        ValueError,
        "nested_absmax: .*cpu.*meta",
    ),
    "nested-offset-dtype": (
        DOUBLE._replace(nested_offset=DOUBLE.nested_offset.double()),
        TypeError,
        "nested_offset: .*float32",
    ),
    "nested-offset-size": (DOUBLE._replace(nested_offset=torch.ones(2)), ValueError, "nested_offset: .*1.*2"),
    "nested-offset-device": (
        DOUBLE._replace(nested_offset=DOUBLE.nested_offset.to("meta")),
        ValueError,
        "nested_offset: .*cpu.*meta",
    ),
    "quant-type": (SINGLE._replace(quant_type="int4"), ValueError, "quant_type: .*int4"),
    "blocksize": (SINGLE._replace(blocksize=48), ValueError, "blocksize: .*48"),
}


@every_op
@pytest.mark.parametrize(("q", "error", "message"), BAD.values(), ids=BAD)
def test_bad_quantized_weight(q: Quantized, error: type[Exception], message: str, op: str) -> None:
    with pytest.raises(error, match=f"^{op}: {message}"):
        CALLS[op](q)


@every_op
def test_rows_and_flat_layout_give_the_same(op: str, cpu_path: str) -> None:
    flat = DOUBLE._replace(packed=DOUBLE.packed.reshape(-1), absmax=DOUBLE.absmax.reshape(-1))
    assert_same(CALLS[op](flat), CALLS[op](DOUBLE))


@every_op
def test_non_contiguous_quantized_weight(op: str, cpu_path: str) -> None:
    spread = DOUBLE._replace(packed=DOUBLE.packed.T.contiguous().T, absmax=DOUBLE.absmax.T.contiguous().T)
    assert not spread.packed.is_contiguous()
    assert_same(CALLS[op](spread), CALLS[op](DOUBLE))


def test_non_contiguous_nested_absmax(cpu_path: str) -> None:
    q = quantize(normal(512, 256), "nf4", 64, double_quant=True)
    spread = q._replace(nested_absmax=torch.stack([q.nested_absmax, torch.zeros_like(q.nested_absmax)], 1)[:, 0])
    x = normal(2, 256)
    linear_4bit = torch.ops.qlora_ext.linear_4bit
    assert_same(linear_4bit(x, *spread, 512, None), linear_4bit(x, *q, 512, None))
