"""atom and red: one thread after the other, in the order of their slots or against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..operands import Action, Threads
from ..syntax import Vector
from ..types import Type
from .half import decode_half, half_operation, packed_operation

if TYPE_CHECKING:
    from ..wave import Wave

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, value: old + value,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, value: value,
    "inc": lambda old, value: type(old)(0) if old >= value else old + type(old)(1),
    "dec": lambda old, value: value if old == 0 or old > value else old - type(old)(1),
}


def _operation(name: str, type_: Type) -> Callable[[Any, Any], Any]:
    if type_.kind in ("h2", "bf2"):
        return lambda old, value: packed_operation(name, type_.kind, [old, value])
    if type_.kind in ("h", "bf"):
        kind = type_.kind
        return lambda old, value: half_operation(name, kind, [decode_half(old, kind), decode_half(value, kind)])
    return _OPERATIONS[name]


@decodes("atom", "red")
def atom(code: Code) -> Action:
    first = 1 if code.name == "atom" else 0
    if isinstance(code.operands[first + 1], Vector):
        raise UnsupportedError(code.instruction.text)
    type_ = code.type if code.type.kind in ("u", "s", "f") else code.type.raw
    name = code.one_of((*_OPERATIONS, "cas"))
    address, read = code.address(first), code.read(first + 1, type_)
    read_new = code.read(first + 2, type_) if name == "cas" else None
    apply = _operation(name, code.type) if name != "cas" else None
    write = code.write(0, type_) if code.name == "atom" else None
    plain_add = name == "add" and code.type.kind in ("u", "s", "f")

    def action(wave: Wave, threads: Threads) -> None:
        count = wave.count(threads)
        values = np.broadcast_to(read(wave, threads), count)
        new = np.broadcast_to(read_new(wave, threads), count) if read_new else values
        place = np.broadcast_to(address(wave, threads), count)
        buffer, at = wave.memory.atomic(code.instruction.space, place, type_.bits // 8, threads, code.instruction)
        memory = buffer.cells(type_.bits // 8).view(type_.dtype)
        old = np.empty(count, type_.dtype)
        if plain_add and np.unique(at).size == count:
            old[:] = memory[at]
            memory[at] = old + values
        else:
            for i in range(count)[:: -1 if wave.options.atom_reverse else 1]:
                old[i] = now = memory[at[i]]
                if apply is not None:
                    memory[at[i]] = apply(now, values[i])
                elif now == values[i]:
                    memory[at[i]] = new[i]
        if write is not None:
            write(wave, threads, old)

    return action
