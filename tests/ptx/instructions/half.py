"""f16 and bf16 arithmetic, single and in packed pairs: exact in float64 (or rounded to odd), then rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..formats import bf16_to_f32, f64_to_bf16, minimum_maximum, relu, saturate, sum_to_odd
from ..operands import Action
from ..types import B16, B32

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": sum_to_odd,
    "sub": lambda a, b: sum_to_odd(a, -b),
    "mul": np.multiply,
    "fma": lambda a, b, c: sum_to_odd(a * b, c),
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "tanh": np.tanh,
}


def half_operation(name: str, kind: str, values: Sequence[Any], modifiers: Sequence[str] = ()) -> Any:
    """The 16 bits of one operation on f16 (kind h, float16 values) or bf16 (kind bf, float32 values)."""
    exact = np.broadcast_arrays(*(value.astype(np.float64) for value in values))
    if name in ("min", "max"):
        result = minimum_maximum(*exact, largest=name == "max", nan_wins="NaN" in modifiers)
    else:
        result = _FUNCTIONS[name](*exact)
    if "relu" in modifiers:
        result = relu(result)
    if "sat" in modifiers:
        result = saturate(result)
    return f64_to_bf16(result) if kind == "bf" else np.asarray(result).astype(np.float16).view(np.uint16)


def decode_half(bits: Any, kind: str) -> Any:
    return bf16_to_f32(bits) if kind == "bf" else bits.view(np.float16)


def unpack_halves(pair: Any, kind: str) -> tuple[Any, Any]:
    """The low and the high half of an h2 or bf2."""
    low, high = pair.astype(np.uint16), (pair >> np.uint32(16)).astype(np.uint16)
    single = kind.removesuffix("2")
    return decode_half(low, single), decode_half(high, single)


def pack_halves(low: Any, high: Any) -> Any:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def packed_operation(name: str, kind: str, pairs: Sequence[Any], modifiers: Sequence[str] = ()) -> Any:
    """half_operation on both halves."""
    halves = zip(*(unpack_halves(pair, kind) for pair in pairs), strict=True)
    return pack_halves(*(half_operation(name, kind.removesuffix("2"), values, modifiers) for values in halves))


def _check(code: Code) -> None:
    if code.name not in (*_FUNCTIONS, "min", "max") or code.has("xorsign"):
        raise UnsupportedError(code.instruction.text)


@decodes(*_FUNCTIONS, "min", "max", kinds="h bf")
def single(code: Code) -> Action:
    _check(code)
    count = len(code.operands) - 1
    return code.elementwise(
        lambda *values: half_operation(code.name, code.type.kind, values, code.parts), B16, *[code.type] * count
    )


@decodes(*_FUNCTIONS, "min", "max", kinds="h2 bf2")
def packed(code: Code) -> Action:
    _check(code)
    count = len(code.operands) - 1
    return code.elementwise(
        lambda *pairs: packed_operation(code.name, code.type.kind, pairs, code.parts), B32, *[B32] * count
    )
