"""Bitwise logic and shifts: and, or, xor, not, cnot, lop3, shl, shr, shf, prmt."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..operands import Action
from ..syntax import Immediate
from ..types import B32, U32, Type

_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@decodes("and", "or", "xor")
def bitwise(code: Code) -> Action:
    type_ = code.type.raw
    return code.elementwise(_BITWISE[code.name], type_, type_, type_)


@decodes("not")
def not_(code: Code) -> Action:
    return code.elementwise(np.invert, code.type.raw, code.type.raw)


@decodes("cnot")
def cnot(code: Code) -> Action:
    return code.elementwise(lambda value: value == 0, code.type.raw, code.type.raw)


def shift(value: Any, count: Any, bits: int, right: bool) -> Any:
    """Counts beyond the width shift everything out (to the sign where value is signed), unlike numpy's and C's."""
    count = np.asarray(count).astype(np.uint64)
    clamped = np.minimum(count, np.uint64(bits - 1)).astype(value.dtype)
    if not right:
        return np.where(count >= bits, value.dtype.type(0), value << clamped)
    shifted = value >> clamped
    return shifted if value.dtype.kind == "i" else np.where(count >= bits, value.dtype.type(0), shifted)


@decodes("shl", "shr")
def shl_shr(code: Code) -> Action:
    type_, right = code.type, code.name == "shr"
    return code.elementwise(lambda value, count: shift(value, count, type_.bits, right), type_, type_, U32)


@decodes("lop3")
def lop3(code: Code) -> Action:
    """Bit a*4 + b*2 + c of the table is the result where the three inputs have these bits."""
    table = code.operands[4]
    if code.has("BOOL") or not isinstance(table, Immediate):
        raise UnsupportedError(code.instruction.text)

    def look_up(a: Any, b: Any, c: Any) -> Any:
        result = np.uint32(0)
        for i in range(8):
            if int(table.value) >> i & 1:
                result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return result

    return code.elementwise(look_up, B32, B32, B32, B32)


def _together(low: Any, high: Any) -> Any:
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


@decodes("shf")
def shf(code: Code) -> Action:
    """The pair b:a, shifted; .l gives the high half, .r the low one."""
    left, clamp = code.has("l"), code.has("clamp")

    def funnel(a: Any, b: Any, count: Any) -> Any:
        count = count.astype(np.uint64)
        count = np.minimum(count, np.uint64(32)) if clamp else count & np.uint64(31)
        pair = _together(a, b)
        return (((pair << count) >> np.uint64(32)) if left else (pair >> count)).astype(np.uint32)

    return code.elementwise(funnel, B32, B32, B32, U32)


# the source byte of each result byte, by the two low bits of the selector
_PERMUTES = {
    "f4e": lambda k, i: (k + i) & 7,
    "b4e": lambda k, i: (k - i) & 7,
    "rc8": lambda k, i: k,
    "ecl": lambda k, i: np.maximum(k, i),
    "ecr": lambda k, i: np.minimum(k, i),
    "rc16": lambda k, i: (k & 1) * 2 + (i & 1),
}


@decodes("prmt")
def prmt(code: Code) -> Action:
    """Without a mode a nibble of c selects a byte of b:a, and its top bit replicates that byte's sign instead."""
    mode = next((part for part in code.parts if part in _PERMUTES), None)

    def permute(a: Any, b: Any, selector: Any) -> Any:
        pair, result = _together(a, b), np.uint32(0)
        for i in range(4):
            if mode is None:
                nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            else:
                nibble = np.asarray(_PERMUTES[mode]((selector & np.uint32(3)).astype(np.int64), i)).astype(np.uint64)
            byte = (pair >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(nibble & np.uint64(8), sign, byte)
            result = result | (byte.astype(np.uint32) << np.uint32(8 * i))
        return result

    return code.elementwise(permute, B32, B32, B32, Type("b", 32))
