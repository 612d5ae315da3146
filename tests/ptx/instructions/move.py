"""mov, selp, slct, and the address spaces: cvta, isspacep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..memory import WINDOW, WINDOW_BITS
from ..operands import Action, Threads
from ..syntax import Vector
from ..types import PRED, U64, UINT, Type

if TYPE_CHECKING:
    from ..wave import Wave


@decodes("mov")
def mov(code: Code) -> Action:
    type_ = code.type.raw
    if isinstance(code.operands[0], Vector):
        return _unpack(code, type_)
    if isinstance(code.operands[1], Vector):
        return _pack(code, type_)
    return code.elementwise(lambda value: value, type_, type_)


def _unpack(code: Code, type_: Type) -> Action:
    bits = type_.bits // len(code.items(0))
    read, writes = code.read(1, type_), code.write_each(0, Type("b", bits))

    def action(wave: Wave, threads: Threads) -> None:
        value = np.array(read(wave, threads))  # a copy: a part may be written to the register it is read from
        for i, write in enumerate(writes):
            write(wave, threads, (value >> type_.dtype(i * bits)).astype(UINT[bits]))

    return action


def _pack(code: Code, type_: Type) -> Action:
    bits = type_.bits // len(code.items(1))
    reads, write = code.read_each(1, Type("b", bits)), code.write(0, type_)

    def action(wave: Wave, threads: Threads) -> None:
        value: Any = type_.dtype(0)
        for i, read in enumerate(reads):
            value = value | (read(wave, threads).astype(type_.dtype) << type_.dtype(i * bits))
        write(wave, threads, value)

    return action


@decodes("selp")
def selp(code: Code) -> Action:
    type_ = code.type.raw
    return code.elementwise(lambda a, b, choose: np.where(choose, a, b), type_, type_, type_, PRED)


@decodes("slct")
def slct(code: Code) -> Action:
    result = Type("b", int(code.parts[-2][1:]))
    return code.elementwise(lambda a, b, sign: np.where(sign >= 0, a, b), result, result, result, code.type)


@decodes("cvta")
def cvta(code: Code) -> Action:
    """A generic address is its offset plus the window of its space; global memory has none."""
    space = next((name for part in code.parts if (name := part.split("::")[0]) in WINDOW), "global")
    window = 0 if space == "global" else WINDOW[space]
    shift = np.uint64((-window if code.has("to") else window) % 2**64)
    return code.elementwise(lambda value: value + shift, code.type, code.type)


@decodes("isspacep")
def isspacep(code: Code) -> Action:
    space = code.parts[1].split("::")[0]
    window = WINDOW["global" if space == "const" else space] >> WINDOW_BITS
    return code.elementwise(lambda value: (value >> np.uint64(WINDOW_BITS)) == window, PRED, U64)
