"""Single instructions on plain Python integers, written from the PTX ISA text and independent of the interpreter."""

from __future__ import annotations

M32, M64 = 2**32 - 1, 2**64 - 1


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def bfe(a: int, b: int, c: int, bits: int, is_signed: bool) -> int:
    position, length, msb = b & 255, c & 255, bits - 1
    sign = (a >> min(position + length - 1, msb)) & 1 if is_signed and length else 0
    result = 0
    for i in range(bits):
        bit = (a >> (position + i)) & 1 if i < length and position + i <= msb else sign
        result |= bit << i
    return result


def bfi(a: int, b: int, c: int, d: int, bits: int) -> int:
    position, length, result = c & 255, d & 255, b
    for i in range(length):
        if position + i < bits:
            result = (result & ~(1 << (position + i))) | (((a >> i) & 1) << (position + i))
    return result


def bfind(a: int, bits: int, is_signed: bool, shift_amount: bool = False) -> int:
    if is_signed:
        a = signed(a, bits)
        a = ~a if a < 0 else a
    highest = a.bit_length() - 1
    return (bits - 1 - highest if shift_amount and highest >= 0 else highest) & M32


def bmsk(a: int, b: int, clamps: bool) -> int:
    position, length = (min(a, 32), min(b, 32)) if clamps else (a & 31, b & 31)
    return (((1 << length) - 1) << position) & M32


def brev(a: int, bits: int) -> int:
    return int(f"{a:0{bits}b}"[::-1], 2)


_PERMUTATIONS = {
    "f4e": ["0123", "1234", "2345", "3456"],
    "b4e": ["0765", "1076", "2107", "3210"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["0123", "1123", "2223", "3333"],
    "ecr": ["0000", "0111", "0122", "0123"],
    "rc16": ["0101", "2323", "0101", "2323"],
}


def byte_permute(a: int, b: int, c: int, mode: str | None = None) -> int:
    source = [((a | b << 32) >> 8 * i) & 255 for i in range(8)]
    if mode:
        return sum(source[int(digit)] << 8 * i for i, digit in enumerate(_PERMUTATIONS[mode][c & 3]))
    result = 0
    for i in range(4):
        selector = (c >> 4 * i) & 15
        byte = source[selector & 7]
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def funnel_shift(a: int, b: int, c: int, left: bool, clamps: bool) -> int:
    count, pair = min(c, 32) if clamps else c & 31, a | b << 32
    return ((pair << count) >> 32) & M32 if left else (pair >> count) & M32


def lop3(a: int, b: int, c: int, table: int) -> int:
    return sum(((table >> (((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1))) & 1) << i for i in range(32))


def _element(value: int, bits: int, i: int, type_: str) -> int:
    part = (value >> bits * i) & ((1 << bits) - 1)
    return signed(part, bits) if type_ == "s32" else part


def dot4(a: int, b: int, c: int, a_type: str, b_type: str) -> int:
    return (c + sum(_element(a, 8, i, a_type) * _element(b, 8, i, b_type) for i in range(4))) & M32


def dot2(a: int, b: int, c: int, a_type: str, b_type: str, high: bool) -> int:
    first = 2 if high else 0
    return (c + sum(_element(a, 16, i, a_type) * _element(b, 8, i + first, b_type) for i in range(2))) & M32
