"""Counting, finding and moving bit fields: popc, clz, bfind, brev, bfe, bfi, bmsk."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..decode import Code, decodes
from ..operands import Action
from ..types import B32, U32, UINT
from .logic import shift


def _length(value: Any) -> Any:
    """The position of the highest set bit plus one, as int32; 0 for 0."""
    filled = np.array(value)
    for i in range(value.dtype.itemsize.bit_length() + 2):
        filled |= filled >> filled.dtype.type(1 << i)
    return np.bitwise_count(filled).astype(np.int32)


@decodes("popc")
def popc(code: Code) -> Action:
    return code.elementwise(np.bitwise_count, U32, code.type)


@decodes("clz")
def clz(code: Code) -> Action:
    return code.elementwise(lambda value: code.type.bits - _length(value), U32, code.type)


@decodes("bfind")
def bfind(code: Code) -> Action:
    """The highest bit that differs from the sign, or with .shiftamt the shift that brings it to the top; -1 if none."""
    type_, shift_amount = code.type, code.has("shiftamt")

    def find(value: Any) -> Any:
        length = _length(np.where(value < 0, ~value, value).view(UINT[type_.bits]))
        if not shift_amount:
            return length - 1
        return np.where(length > 0, type_.bits - length, -1)

    return code.elementwise(find, U32, type_)


@decodes("brev")
def brev(code: Code) -> Action:
    def reverse(value: Any) -> Any:
        unit, result = value.dtype.type, np.zeros_like(value)
        for i in range(code.type.bits):
            result = result | (((value >> unit(i)) & unit(1)) << unit(code.type.bits - 1 - i))
        return result

    return code.elementwise(reverse, code.type, code.type)


def _low_mask(length: Any, bits: int) -> Any:
    one = np.asarray(UINT[bits](1))
    return shift(one, length, bits, right=False) - one.dtype.type(1)


@decodes("bfe")
def bfe(code: Code) -> Action:
    """`length` bits from `position`; what lies beyond the top is zero, or for .s the sign of the field."""
    bits, signed = code.type.bits, code.type.kind == "s"

    def extract(value: Any, position: Any, length: Any) -> Any:
        position, length = (x.astype(np.int64) & 0xFF for x in (position, length))
        inside = _low_mask(np.clip(bits - position, 0, length), bits)
        field = shift(value, position, bits, right=True) & inside
        if not signed:
            return field
        top = np.clip(position + length - 1, 0, bits - 1).astype(value.dtype)
        negative = (length > 0) & ((value >> top) & value.dtype.type(1)).astype(bool)
        return np.where(negative, field | ~inside, field)

    return code.elementwise(extract, code.type.raw, code.type.raw, U32, U32)


@decodes("bfi")
def bfi(code: Code) -> Action:
    """b with `length` bits of a put in at `position`."""
    type_ = code.type

    def insert(a: Any, b: Any, position: Any, length: Any) -> Any:
        position, length = (x.astype(np.int64) & 0xFF for x in (position, length))
        field = shift(_low_mask(length, type_.bits), position, type_.bits, right=False)
        return (b & ~field) | (shift(a, position, type_.bits, right=False) & field)

    return code.elementwise(insert, type_, type_, type_, U32, U32)


@decodes("bmsk")
def bmsk(code: Code) -> Action:
    """`length` ones from `position`; both are taken modulo 32 or clamped to it."""

    def mask(position: Any, length: Any) -> Any:
        if not code.has("clamp"):
            position, length = position & np.uint32(31), length & np.uint32(31)
        return shift(_low_mask(length, 32), position, 32, right=False)

    return code.elementwise(mask, B32, U32, U32)
