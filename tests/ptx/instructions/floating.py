"""float32 and float64 arithmetic. What PTX calls approximate is rounded correctly here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..formats import canonical_nan, f64_to_f32, flush, fma32, fma64, minimum_maximum, saturate, sum_to_odd
from ..operands import Action
from ..types import PRED

_EXACT: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda value: 1.0 / np.sqrt(value),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def _finished(code: Code, function: Callable[..., Any]) -> Action:
    """function with .ftz on both sides, the canonical NaN, and .sat."""
    flushed, saturated = code.has("ftz"), code.has("sat")

    def whole(*values: Any) -> Any:
        result = canonical_nan(np.asarray(function(*(map(flush, values) if flushed else values))))
        result = flush(result) if flushed else result
        return saturate(result) if saturated else result

    return code.elementwise(whole, *[code.type] * len(code.operands))


def _directed(name: str, mode: str) -> Callable[..., Any]:
    """float32 results rounded other than to nearest: exact (or rounded to odd) in float64 first."""

    def function(a: Any, b: Any) -> Any:
        a, b = np.broadcast_arrays(a.astype(np.float64), b.astype(np.float64))
        exact = a * b if name == "mul" else sum_to_odd(a, b if name == "add" else -b)
        return f64_to_f32(exact, mode)

    return function


@decodes("add", "sub", "mul", "div", kinds="f")
def arithmetic(code: Code) -> Action:
    if code.rounding == "rn":
        return _finished(code, _EXACT[code.name])
    if code.type.bits == 64 or code.name == "div":
        raise UnsupportedError(code.instruction.text)
    return _finished(code, _directed(code.name, code.rounding))


@decodes("fma", "mad", kinds="f")
def fma(code: Code) -> Action:
    mode = code.rounding
    if code.type.bits == 32:
        return _finished(code, lambda a, b, c: fma32(a, b, c, mode))
    if mode != "rn":
        raise UnsupportedError(code.instruction.text)
    return _finished(code, fma64)


@decodes("min", "max", kinds="f")
def min_max(code: Code) -> Action:
    if code.has("xorsign"):
        raise UnsupportedError(code.instruction.text)
    largest, nan_wins = code.name == "max", code.has("NaN")
    return _finished(code, lambda a, b: minimum_maximum(a, b, largest, nan_wins))


@decodes("neg", "abs", kinds="f")
def neg_abs(code: Code) -> Action:
    """Of the sign bit alone: a NaN keeps its payload."""
    function = np.negative if code.name == "neg" else np.abs
    operation = (lambda value: flush(function(value))) if code.has("ftz") else function
    return code.elementwise(operation, code.type, code.type)


@decodes(*_FUNCTIONS, kinds="f")
def functions(code: Code) -> Action:
    if code.rounding != "rn":
        raise UnsupportedError(code.instruction.text)
    function = _FUNCTIONS[code.name]
    return _finished(code, lambda value: function(value.astype(np.float64)).astype(value.dtype))


@decodes("copysign", kinds="f")
def copysign(code: Code) -> Action:
    return code.elementwise(lambda sign, size: np.copysign(size, sign), *[code.type] * 3)


_TESTS: dict[str, Callable[[Any], Any]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda value: ~np.isnan(value),
    "notanumber": np.isnan,
    "normal": lambda value: np.isfinite(value) & (np.abs(value) >= np.finfo(value.dtype).tiny),
    "subnormal": lambda value: (value != 0) & (np.abs(value) < np.finfo(value.dtype).tiny),
}


@decodes("testp", kinds="f")
def testp(code: Code) -> Action:
    return code.elementwise(_TESTS[code.parts[1]], PRED, code.type)
