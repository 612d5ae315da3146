"""cvt: between integers, floats, halves and packed pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..formats import canonical_nan, f32_to_bf16, f64_to_bf16, f64_to_f32, flush, relu, saturate, to_f16
from ..operands import Action
from ..types import B16, B32, F32, S32, UINT, Type, parse_type
from .half import pack_halves

_TO_INTEGER = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}


def _limits(type_: Type) -> tuple[int, int]:
    info = np.iinfo(type_.dtype)
    return int(info.min), int(info.max)


@decodes("cvt")
def cvt(code: Code) -> Action:
    if code.has("pack"):
        return _pack_integers(code)
    result, source = parse_type(code.parts[-2]), code.type
    if code.parts[-2] == "tf32":
        return code.elementwise(_to_tf32(code.has("rna")), B32, B32)
    if result.kind in ("h2", "bf2"):
        return _pack_floats(code, result)
    if source.is_float and result.is_float:
        return _float_to_float(code, result)
    if source.is_float:
        return _float_to_integer(code, result)
    if result.is_float:
        return _integer_to_float(code, result)
    if code.has("sat"):
        return code.elementwise(lambda value: _clamp(value, *_limits(result)), result, source)
    return code.elementwise(lambda value: value.astype(result.dtype), result, source)


def _clamp(value: Any, low: int, high: int) -> Any:
    """Within [low, high], as far as value's own type reaches there."""
    info = np.iinfo(value.dtype)
    return np.clip(value, value.dtype.type(max(low, int(info.min))), value.dtype.type(min(high, int(info.max))))


def _pack_integers(code: Code) -> Action:
    """cvt.pack.sat: a and b saturated and put together, a above b; with c, its low bits above both."""
    has_c = len(code.operands) == 4
    narrow = parse_type(code.parts[-3 if has_c else -2])
    bits = np.uint32(narrow.bits)

    def pack(a: Any, b: Any, *above: Any) -> Any:
        high, low = (np.clip(x, *_limits(narrow)).astype(narrow.dtype).view(UINT[narrow.bits]) for x in (a, b))
        pair = (high.astype(np.uint32) << bits) | low.astype(np.uint32)
        return pair | (above[0] << (bits + bits)) if above else pair

    return code.elementwise(pack, B32, S32, S32, *([B32] if has_c else []))


def _to_tf32(away: bool) -> Callable[[Any], Any]:
    """float32 with the low 13 bits rounded off: ties away from zero (.rna), or to even."""

    def convert(bits: Any) -> Any:
        half = np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        return (bits + half) & np.uint32(0xFFFFE000)

    return convert


def _to_half_bits(result: str, mode: str) -> Callable[[Any], Any]:
    """float32 or float64 values to the 16 bits of an h or bf."""

    def convert(value: Any) -> Any:
        value = np.asarray(value)
        if result == "h":
            return to_f16(value, mode).view(np.uint16)
        if value.dtype == np.float64:
            if mode != "rn":
                raise UnsupportedError(f"rounding mode {mode} from f64 to bf16")
            return f64_to_bf16(value)
        return f32_to_bf16(value.astype(np.float32), mode)

    return convert


def _pack_floats(code: Code, result: Type) -> Action:
    """d = a above b."""
    if code.parts[-1] != "f32":
        raise UnsupportedError(code.instruction.text)
    convert = _to_half_bits(result.kind.removesuffix("2"), code.rounding)
    clip = relu if code.has("relu") else lambda value: value
    return code.elementwise(lambda a, b: pack_halves(convert(clip(b)), convert(clip(a))), B32, F32, F32)


def _float_to_float(code: Code, result: Type) -> Action:
    integral = next((_TO_INTEGER[part] for part in code.parts if part in _TO_INTEGER), None)
    flushed, mode = code.has("ftz"), code.rounding

    def narrow(value: Any) -> Any:
        if result.bits == 16:
            bits = _to_half_bits(result.kind, mode)(value)
            return bits.view(np.float16) if result.kind == "h" else bits
        if result.bits == 32 and value.dtype == np.float64:
            return canonical_nan(f64_to_f32(value, mode))
        return value.astype(result.dtype)

    def convert(value: Any) -> Any:
        value = flush(value) if flushed and value.dtype == np.float32 else value
        value = integral(value) if integral else value
        value = relu(value) if code.has("relu") else value
        value = narrow(np.asarray(value))
        value = saturate(value) if code.has("sat") else value
        return flush(value) if flushed and value.dtype == np.float32 else value

    return code.elementwise(convert, B16 if result.kind == "bf" else result, code.type)


def _float_to_integer(code: Code, result: Type) -> Action:
    """Clamped to the range; NaN becomes 0, or in 64 bits the top bit alone."""
    integral = _TO_INTEGER[code.one_of(tuple(_TO_INTEGER), default="rzi")]
    low, high = _limits(result)
    of_nan = UINT[64](1 << 63).view(result.dtype) if result.bits == 64 else result.dtype(0)

    def convert(value: Any) -> Any:
        value = integral((flush(value) if code.has("ftz") else value).astype(np.float64))
        integer = np.maximum(value, float(low)).astype(result.dtype)
        integer = np.where(value >= float(high), result.dtype(high), integer)  # float(high) itself may be too large
        return np.where(np.isnan(value), of_nan, integer)

    return code.elementwise(convert, result, code.type)


def _integer_to_float(code: Code, result: Type) -> Action:
    source, mode = code.type, code.rounding
    if mode != "rn" and (result != F32 or source.bits > 32):
        raise UnsupportedError(code.instruction.text)
    if result.kind == "bf":
        return code.elementwise(lambda value: f64_to_bf16(np.asarray(value.astype(np.float64))), B16, source)
    if mode != "rn":
        return code.elementwise(lambda value: f64_to_f32(value.astype(np.float64), mode), result, source)
    return code.elementwise(lambda value: value.astype(result.dtype), result, source)
