"""setp and set: comparisons, of packed halves too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..formats import flush
from ..operands import Action, Threads
from ..types import B32, PRED, parse_type
from .half import unpack_halves

if TYPE_CHECKING:
    from ..wave import Wave

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(how: str, a: Any, b: Any) -> Any:
    """Ordered comparisons of floats are false on NaN, unordered ones (with u) true."""
    how = _UNSIGNED.get(how, how)
    if a.dtype.kind != "f":
        return _ORDERED[how](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if how == "nan":
        return nan
    if how == "num":
        return ~nan
    if how in _UNORDERED:
        return _ORDERED[_UNORDERED[how]](a, b) | nan
    return _ORDERED[how](a, b) & ~nan


def _combined(code: Code) -> Any:
    """The reader of the comparison's outcome, and of its complement: both after and, or, xor with the third operand."""
    how, type_ = code.parts[1], code.type
    read_a, read_b = code.read(1, type_), code.read(2, type_)
    combine = _COMBINE.get(code.parts[2])
    read_c = code.read(3, PRED) if combine else None
    flushed = code.has("ftz")

    def outcome(wave: Wave, threads: Threads) -> tuple[Any, Any]:
        a, b = read_a(wave, threads), read_b(wave, threads)
        if flushed:
            a, b = flush(a), flush(b)
        yes = compare(how, a, b)
        if combine is None or read_c is None:
            return yes, ~yes
        c = read_c(wave, threads)
        return combine(yes, c), combine(~yes, c)

    return outcome


@decodes("setp", kinds="b u s f h bf")
def setp(code: Code) -> Action:
    outcome, (write, write_complement) = _combined(code), code.write_pair(PRED)

    def action(wave: Wave, threads: Threads) -> None:
        yes, no = outcome(wave, threads)
        write(wave, threads, yes)
        write_complement(wave, threads, no)

    return action


@decodes("set", kinds="b u s f h bf")
def set_(code: Code) -> Action:
    """All ones, or 1.0 for a float result."""
    outcome, result = _combined(code), parse_type(code.parts[-2])
    write = code.write(0, result)
    one = result.dtype(1.0) if result.is_float else result.dtype(~np.uint64(0) >> np.uint64(64 - result.bits))

    def action(wave: Wave, threads: Threads) -> None:
        write(wave, threads, np.where(outcome(wave, threads)[0], one, result.dtype(0)))

    return action


@decodes("setp", kinds="h2 bf2")
def setp_packed(code: Code) -> Action:
    """p|q: the low and the high half."""
    how, kind = code.parts[1], code.type.kind
    read_a, read_b, writes = code.read(1, B32), code.read(2, B32), code.write_pair(PRED)

    def action(wave: Wave, threads: Threads) -> None:
        halves = zip(
            unpack_halves(read_a(wave, threads), kind), unpack_halves(read_b(wave, threads), kind), strict=True
        )
        for write, outcome in zip(writes, [compare(how, a, b) for a, b in halves], strict=True):
            write(wave, threads, outcome)

    return action


@decodes("set", kinds="h2 bf2")
def set_packed(code: Code) -> Action:
    how, kind = code.parts[1], code.type.kind
    one = 0xFFFF if code.parts[-2] in ("u32", "s32", "b32") else 0x3C00 if kind == "h2" else 0x3F80

    def both(a: Any, b: Any) -> Any:
        low, high = (
            np.where(compare(how, x, y), np.uint32(one), np.uint32(0))
            for x, y in zip(unpack_halves(a, kind), unpack_halves(b, kind), strict=True)
        )
        return low | (high << np.uint32(16))

    return code.elementwise(both, B32, B32, B32)
