"""Number formats: bf16, rounding modes, fused multiply-add and minimum/maximum as the PTX ISA defines them.

Rounding to odd makes a float64 intermediate safe: rounded once more, to any format at least two bits shorter, it
gives the correctly rounded result of the exact sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import UnsupportedError

Array = Any  # an ndarray or a numpy scalar
NAN32 = np.array(0x7FFFFFFF, np.uint32).view(np.float32)[()]
TINY32 = np.finfo(np.float32).tiny


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array, mode: str = "rn") -> Array:
    """The 16 bits; every NaN becomes 0x7fff."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    if mode == "rn":
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    elif mode != "rz":
        raise UnsupportedError(f"rounding mode {mode} to bf16")
    return np.where(np.isnan(value), np.uint32(0x7FFF), bits >> np.uint32(16)).astype(np.uint16)


def _to_odd(rounded: Array, error: Array) -> Array:
    """rounded with its last bit set wherever error says that it is not the exact value."""
    integer = {4: np.int32, 8: np.int64}[rounded.dtype.itemsize]
    bits = rounded.view(integer)
    inexact = (error != 0) & np.isfinite(rounded) & np.isfinite(error) & ((bits & 1) == 0)
    toward_error = np.where((error > 0) != np.signbit(rounded), bits + 1, bits - 1).astype(integer)
    return np.where(inexact, toward_error, bits).view(rounded.dtype)


def sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd (the error of a sum is itself a float64: Knuth's TwoSum)."""
    total = np.asarray(a + b)
    b_part = total - a
    return _to_odd(total, (a - (total - b_part)) + (b - b_part))


def f64_to_f32(value: Array, mode: str = "rn") -> Array:
    nearest = value.astype(np.float32)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    if mode == "rz":
        return np.where(np.abs(back) > np.abs(value), np.nextafter(nearest, np.float32(0)), nearest)
    if mode == "rm":
        return np.where(back > value, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return np.where(back < value, np.nextafter(nearest, np.float32(np.inf)), nearest)


def to_f16(value: Array, mode: str = "rn") -> Array:
    """float32 or float64 to float16."""
    nearest = value.astype(np.float16)
    if mode == "rn":
        return nearest
    if mode != "rz":
        raise UnsupportedError(f"rounding mode {mode} to f16")
    too_far = np.abs(nearest.astype(value.dtype)) > np.abs(value)
    return np.where(too_far, np.nextafter(nearest, np.float16(0)), nearest)


def f64_to_bf16(value: Array) -> Array:
    """The 16 bits, rounded once."""
    single = np.asarray(value.astype(np.float32))
    return f32_to_bf16(_to_odd(single, value - single.astype(np.float64)))


def fma32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """a * b is exact in float64; the sum is rounded once."""
    product, addend = np.broadcast_arrays(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    if mode != "rn":
        return f64_to_f32(sum_to_odd(product, addend), mode)
    total = np.asarray(product + addend)
    # Rounding twice goes wrong only if the first rounding landed on a tie of the second: test the bits below float32.
    suspect = (total.view(np.int64) & 0x0FFFFFFF) == 0
    total[suspect] = sum_to_odd(product[suspect], addend[suspect])
    return total.astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Exact product (Dekker) and sum (TwoSum), then one addition: the last bit may be rounded twice."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (a, b, c)))
    product, split = a * b, 134217729.0
    a_high, b_high = split * a, split * b
    a_high, b_high = a_high - (a_high - a), b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    c_part = total - product
    result = total + (error + ((product - (total - c_part)) + (c - c_part)))
    usable = np.isfinite(result) & (np.abs(a) < 1e290) & (np.abs(b) < 1e290)
    return np.where(usable, result, total)


def flush(value: Array) -> Array:
    """.ftz: a subnormal float32 becomes zero of its sign."""
    size = np.abs(value)
    return np.where((size < TINY32) & (size > 0), np.copysign(np.float32(0), value), value)


def canonical_nan(value: Array) -> Array:
    """float32 arithmetic that yields NaN yields 0x7fffffff."""
    if value.dtype != np.float32 or not np.isnan(value).any():
        return value
    return np.where(np.isnan(value), NAN32, value)


def saturate(value: Array) -> Array:
    """.sat: [0, 1], and NaN becomes 0."""
    return np.where(np.isnan(value), value.dtype.type(0), np.clip(value, value.dtype.type(0), value.dtype.type(1)))


def relu(value: Array) -> Array:
    """.relu: negative becomes 0, NaN stays."""
    return np.where(value <= 0, value.dtype.type(0), value)


def minimum_maximum(a: Array, b: Array, largest: bool, nan_wins: bool) -> Array:
    """min and max: a NaN operand loses unless .NaN is given, and -0 < +0."""
    a, b = np.broadcast_arrays(a, b)
    functions = (np.maximum, np.fmax) if largest else (np.minimum, np.fmin)
    value = functions[0 if nan_wins else 1](a, b)
    negative = (np.signbit(a) & np.signbit(b)) if largest else (np.signbit(a) | np.signbit(b))
    zero = np.where(negative, value.dtype.type(-0.0), value.dtype.type(0.0))
    return np.where((value == 0) & (a == b), zero, value)
