"""Number formats against exact rationals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from .formats import (
    bf16_to_f32,
    canonical_nan,
    f32_to_bf16,
    f64_to_bf16,
    f64_to_f32,
    flush,
    fma32,
    fma64,
    minimum_maximum,
    relu,
    saturate,
    sum_to_odd,
    to_f16,
)
from .instructions.half import half_operation

COUNT = 10_000
FORMATS = {"f64": (53, -1022, 1023), "f32": (24, -126, 127), "bf16": (8, -126, 127), "f16": (11, -14, 15)}
FLOOR: dict[str, Callable[[Fraction], int]] = {
    "rn": round,  # of a Fraction: ties to even
    "rz": math.trunc,
    "rm": math.floor,
    "rp": math.ceil,
}


def rounded(exact: Fraction, format_: str, mode: str = "rn") -> float:
    """exact in that format, with subnormals."""
    precision, smallest, largest = FORMATS[format_]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    value = FLOOR[mode](exact / unit) * unit
    if abs(value) < Fraction(2) ** (largest + 1):
        return float(value)
    to_infinity = mode == "rn" or (mode == "rp" and exact > 0) or (mode == "rm" and exact < 0)
    return math.copysign(math.inf if to_infinity else float((2 - Fraction(2) ** (1 - precision)) * 2**largest), exact)


def numbers(seed: int, bf16: bool = False) -> np.ndarray:
    """Finite float32 of all sizes, subnormals and ends of binades among them."""
    pick = random.Random(seed)
    bits = []
    while len(bits) < COUNT:
        word = pick.getrandbits(32)
        if pick.random() < 0.3:
            word = word & 0xFF800000 | pick.choice([0, 1, 0x7FFFFF, 0x400000])
        word &= 0xFFFF0000 if bf16 else 0xFFFFFFFF
        if word & 0x7F800000 != 0x7F800000:
            bits.append(word)
    return np.array(bits, np.uint32).view(np.float32)


def addends(a: np.ndarray, b: np.ndarray, seed: int) -> np.ndarray:
    """Half of them close to -a * b or just below half an ulp of it: where rounding twice would show."""
    pick = np.random.default_rng(seed)
    factors = pick.choice([-1, 1, 2.0**-24, -(2.0**-25), 2.0**-9, 2.0**-30, 2.0**24], COUNT)
    near = (a.astype(np.float64) * b * factors).astype(np.float32)
    far = numbers(seed)
    return np.where(np.isfinite(near) & (np.arange(COUNT) % 2 == 0), near, far).astype(np.float32)


def exactly(*values: np.ndarray) -> list[tuple[Fraction, ...]]:
    return [tuple(Fraction(float(x)) for x in row) for row in zip(*values, strict=True)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("mode", FLOOR)
def test_fma32(mode: str) -> None:
    a, b = numbers(1), numbers(2)
    c = addends(a, b, 3)
    expected = [rounded(x * y + z, "f32", mode) for x, y, z in exactly(a, b, c)]
    assert np.array_equal(fma32(a, b, c, mode), np.array(expected))


def test_fma_bf16() -> None:
    a, b = numbers(1, bf16=True), numbers(2, bf16=True)
    c = bf16_to_f32(f32_to_bf16(addends(a, b, 3)))
    c = np.where(np.isfinite(c), c, np.float32(1))
    got = bf16_to_f32(half_operation("fma", "bf", [a, b, c]))
    assert np.array_equal(got, np.array([rounded(x * y + z, "bf16") for x, y, z in exactly(a, b, c)]))


def test_fma_f16() -> None:
    pick = np.random.default_rng(4)
    a, b, c = pick.integers(0, 2**16, (3, COUNT), dtype=np.uint16).view(np.float16)
    a, b, c = (np.where(np.isfinite(x), x, np.float16(1)) for x in (a, b, c))
    got = half_operation("fma", "h", [a, b, c]).view(np.float16)
    assert np.array_equal(got, np.array([rounded(x * y + z, "f16") for x, y, z in exactly(a, b, c)]))


def test_fma64() -> None:
    """Its last bit may be rounded twice; a rounding of the product alone would be off by far more."""
    pick = np.random.default_rng(5)
    a, b = pick.standard_normal((2, 2000))
    c = np.where(np.arange(2000) % 2 == 0, -a * b, pick.standard_normal(2000))
    for got, (x, y, z) in zip(fma64(a, b, c), exactly(a, b, c), strict=True):
        exact = rounded(x * y + z, "f64")
        assert abs(got - exact) <= math.ulp(exact)


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_f32_to_bf16(mode: str) -> None:
    x = numbers(6)
    expected = [rounded(value, "bf16", mode) for (value,) in exactly(x)]
    assert np.array_equal(bf16_to_f32(f32_to_bf16(x, mode)), np.array(expected))
    if mode == "rn":
        assert np.array_equal(f32_to_bf16(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_f64_is_rounded_once() -> None:
    x = numbers(7).astype(np.float64) * (1 + np.random.default_rng(7).random(COUNT))
    x = x[np.abs(x) < 1e38]
    assert np.array_equal(bf16_to_f32(f64_to_bf16(x)), np.array([rounded(v, "bf16") for (v,) in exactly(x)]))
    for mode in FLOOR:
        assert np.array_equal(f64_to_f32(x, mode), np.array([rounded(v, "f32", mode) for (v,) in exactly(x)])), mode


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_to_f16(mode: str) -> None:
    x = (np.random.default_rng(8).standard_normal(COUNT) * 10.0 ** (np.arange(COUNT) % 14 - 8)).astype(np.float32)
    assert np.array_equal(to_f16(x, mode), np.array([rounded(v, "f16", mode) for (v,) in exactly(x)]))


def test_sum_to_odd_keeps_what_a_second_rounding_needs() -> None:
    a, b = np.float64(1 + 2.0**-24), np.array([2.0**-60, -(2.0**-60), 0.0])  # a tie of float32, and just beside it
    assert f64_to_f32(sum_to_odd(a, b)).tolist() == [np.float32(1 + 2.0**-23), 1.0, 1.0]


def test_special_values() -> None:
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    assert f32_to_bf16(np.array([nan, -nan, inf, -inf])).tolist() == [0x7FFF, 0x7FFF, 0x7F80, 0xFF80]
    assert canonical_nan(np.array([-nan, 1], np.float32)).view(np.uint32).tolist() == [0x7FFFFFFF, 0x3F800000]
    subnormals = flush(np.array([1e-40, -1e-40, 1.5e-38, 0.0], np.float32))
    assert subnormals.view(np.uint32).tolist() == [0, 1 << 31, np.float32(1.5e-38).view(np.uint32), 0]
    assert saturate(np.array([nan, -1, 0.5, 2], np.float32)).tolist() == [0, 0, 0.5, 1]
    assert np.array_equal(relu(np.array([nan, -1, 2], np.float32)), np.array([nan, 0, 2]), equal_nan=True)


@pytest.mark.parametrize("largest", [False, True])
def test_minimum_and_maximum(largest: bool) -> None:
    a, b = np.array([np.nan, 1, -0.0, 0.0, 2]), np.array([1, np.nan, 0.0, -0.0, 3])
    value = minimum_maximum(a, b, largest, nan_wins=False)
    assert value.tolist() == [1, 1, 0, 0, 3 if largest else 2]
    assert np.signbit(value[2:4]).tolist() == [not largest] * 2  # -0 < +0
    assert np.isnan(minimum_maximum(a, b, largest, nan_wins=True)[:2]).all()
