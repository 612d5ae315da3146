"""PTX types, and the numpy types that their values are computed in."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from .errors import UnsupportedError

UINT: dict[int, type] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT: dict[int, type] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, type] = {16: np.float16, 32: np.float32, 64: np.float64}


class Type(NamedTuple):
    """kind is b, u, s, f as in PTX; h: f16, bf: bf16, h2 and bf2: packed pairs of them in 32 bits, p: predicate."""

    kind: str
    bits: int

    @property
    def dtype(self) -> type:
        """bf16 is computed in float32; a packed pair travels as its 32 bits."""
        if self.kind in ("f", "h"):
            return FLOAT[self.bits]
        if self.kind == "s":
            return SINT[self.bits]
        if self.kind == "bf":
            return np.float32
        return np.bool_ if self.kind == "p" else UINT[self.bits]

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "h", "bf")

    @property
    def raw(self) -> Type:
        """The same bits without a meaning."""
        return self if self.kind == "p" else Type("b", self.bits)


PRED = Type("p", 1)
B16, B32, B64 = Type("b", 16), Type("b", 32), Type("b", 64)
U32, U64, S32 = Type("u", 32), Type("u", 64), Type("s", 32)
F32, F64 = Type("f", 32), Type("f", 64)

_NAMED = {
    "pred": PRED,
    "f16": Type("h", 16),
    "bf16": Type("bf", 16),
    "f16x2": Type("h2", 32),
    "bf16x2": Type("bf2", 32),
    "tf32": B32,
} | {f"{kind}{bits}": Type(kind, bits) for kind in "bus" for bits in (8, 16, 32, 64)}
_NAMED |= {"f32": F32, "f64": F64, "b128": Type("b", 128)}


@functools.cache
def parse_type(text: str) -> Type:
    """`u32` or `.u32` as an instruction or a declaration writes it."""
    try:
        return _NAMED[text.lstrip(".")]
    except KeyError:
        raise UnsupportedError(f"type {text}") from None


def size_of(text: str) -> int:
    """Bytes that a variable of that type takes."""
    return max(parse_type(text).bits // 8, 1)
