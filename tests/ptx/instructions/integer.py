"""Integer arithmetic, with carries, 24-bit and dot products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..operands import Action, Threads
from ..types import B32, SINT, UINT, Type

if TYPE_CHECKING:
    from ..wave import Wave


def _wide(type_: Type) -> Type:
    return Type(type_.kind, 2 * type_.bits)


@decodes("add", "sub", kinds="u s b")
def add_sub(code: Code) -> Action:
    type_ = code.type
    if code.has("cc"):
        return _carrying(code)
    operation = np.add if code.name == "add" else np.subtract
    if not code.has("sat"):
        return code.elementwise(operation, type_, type_, type_)
    limits = np.iinfo(np.int32)
    return code.elementwise(
        lambda a, b: np.clip(operation(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max),
        type_,
        type_,
        type_,
    )


@decodes("addc", "subc", "madc", kinds="u s b")
def with_carry_in(code: Code) -> Action:
    return _carrying(code)


def _carrying(code: Code) -> Action:
    """d = a + b + carry or a - b - borrow (mad: b is c, and a the product); .cc stores the carry."""
    type_ = code.type
    raw = UINT[type_.bits]
    product = code.name in ("mad", "madc")
    reads, write = [code.read(i, type_) for i in range(1, len(code.operands))], code.write(0, type_)
    borrow, takes, stores = code.name in ("sub", "subc"), code.name in ("addc", "subc", "madc"), code.has("cc")

    def action(wave: Wave, threads: Threads) -> None:
        *factors, last = [read(wave, threads) for read in reads]
        a = _multiply(*factors, type_, high=code.has("hi")) if product else factors[0]
        a, b = np.asarray(a).view(raw), np.asarray(last).view(raw)
        carry = wave.get_carry(threads).astype(raw) if takes else raw(0)
        partial = a - b if borrow else a + b
        result = partial - carry if borrow else partial + carry
        if stores:
            wave.put_carry(threads, ((a < b) | (partial < carry)) if borrow else ((partial < a) | (result < partial)))
        write(wave, threads, result)

    return action


def _multiply(a: Any, b: Any, type_: Type, high: bool) -> Any:
    if not high:
        return a * b
    if type_.bits == 64:
        return _high_product_64(a, b)
    wide = _wide(type_).dtype
    return ((a.astype(wide) * b.astype(wide)) >> wide(type_.bits)).astype(type_.dtype)


def _high_product_64(a: Any, b: Any) -> Any:
    """The high half of the 128-bit product, from four products of halves."""
    x, y, low, half = a.astype(np.uint64), b.astype(np.uint64), np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if a.dtype.kind == "u":
        return high
    return (high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))).view(np.int64)


@decodes("mul", "mad", kinds="u s b")
def mul_mad(code: Code) -> Action:
    type_ = code.type
    if code.has("cc"):
        return _carrying(code)
    result = _wide(type_) if code.has("wide") else type_

    def multiply(a: Any, b: Any, *addend: Any) -> Any:
        if code.has("wide"):
            product = a.astype(result.dtype) * b.astype(result.dtype)
        else:
            product = _multiply(a, b, type_, high=code.has("hi"))
        return product + addend[0] if addend else product

    return code.elementwise(multiply, result, type_, type_, *([result] if code.name == "mad" else []))


@decodes("mul24", "mad24", kinds="u s")
def mul24(code: Code) -> Action:
    """The low 32 bits of a product of 24-bit numbers."""
    type_ = code.type

    def multiply(a: Any, b: Any, *addend: Any) -> Any:
        eight = type_.dtype(8)
        product = ((a << eight) >> eight) * ((b << eight) >> eight)
        return product + addend[0] if addend else product

    return code.elementwise(multiply, *[type_] * len(code.operands))


@decodes("div", "rem", kinds="u s")
def div_rem(code: Code) -> Action:
    """Rounds to zero. Division by zero is undefined in PTX: noted, and all ones here."""
    type_, remainder = code.type, code.name == "rem"
    read_a, read_b, write = code.read(1, type_), code.read(2, type_), code.write(0, type_)

    def action(wave: Wave, threads: Threads) -> None:
        a, b = np.broadcast_arrays(read_a(wave, threads), read_b(wave, threads))
        zero = b == 0
        if zero.any():
            wave.findings.note("int-div-zero", code.instruction, "")
        divisor = np.where(zero, type_.dtype(1), b)
        quotient = a // divisor
        if type_.kind == "s":  # numpy rounds down
            quotient = quotient + ((quotient * divisor != a) & ((a < 0) != (divisor < 0)))
        quotient = np.where(zero, UINT[type_.bits](2**type_.bits - 1).view(type_.dtype), quotient)
        write(wave, threads, a - b * quotient if remainder else quotient)

    return action


@decodes("min", "max", kinds="u s")
def min_max(code: Code) -> Action:
    return code.elementwise(np.minimum if code.name == "min" else np.maximum, *[code.type] * 3)


@decodes("neg", "abs", kinds="s")
def neg_abs(code: Code) -> Action:
    return code.elementwise(np.negative if code.name == "neg" else np.abs, code.type, code.type)


@decodes("sad", kinds="u s")
def sad(code: Code) -> Action:
    return code.elementwise(lambda a, b, c: c + np.where(a > b, a - b, b - a), *[code.type] * 4)


def _parts_of(value: Any, bits: int, signed: bool) -> list[Any]:
    parts = [(value >> np.uint32(shift)).astype(UINT[bits]) for shift in range(0, 32, bits)]
    return [part.view(SINT[bits]).astype(np.int64) if signed else part.astype(np.int64) for part in parts]


@decodes("dp4a", "dp2a")
def dot_product(code: Code) -> Action:
    """c plus the products of four bytes with four, or of two halves with the two .lo or .hi bytes of b."""
    bits = 8 if code.name == "dp4a" else 16
    first = 2 if code.has("hi") else 0
    a_signed, b_signed = (part == "s32" for part in code.parts[-2:])

    def dot(a: Any, b: Any, c: Any) -> Any:
        pairs = zip(_parts_of(a, bits, a_signed), _parts_of(b, 8, b_signed)[first:], strict=False)
        return c.astype(np.int64) + sum(x * y for x, y in pairs)

    return code.elementwise(dot, B32, B32, B32, B32)
