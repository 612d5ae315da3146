"""ld and st, plain and vector. The checks are memory's own (see memory.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..decode import Code, decodes, symbol_of
from ..errors import UnsupportedError
from ..operands import Action, Threads
from ..types import Type

if TYPE_CHECKING:
    from ..wave import Wave


def _value_type(code: Code) -> Type:
    """Loads extend signed values by their sign; everything else moves as bits."""
    type_ = code.type
    if type_.bits > 64:
        raise UnsupportedError(code.instruction.text)
    return type_ if type_.kind == "s" else type_.raw


def _space(code: Code, wave: Wave, address_operand: int) -> str:
    """The parameters of an inlined call lie in local memory, so the symbol knows better than the opcode."""
    symbol = symbol_of(code.operands[address_operand])
    if symbol and code.instruction.space in ("param", "generic"):
        return wave.symbol(symbol)[0]
    return code.instruction.space


@decodes("ld", "ldu")
def ld(code: Code) -> Action:
    type_, address = _value_type(code), code.address(1)
    writes = code.write_each(0, type_)
    if len(writes) != code.instruction.vector:
        raise UnsupportedError(code.instruction.text)

    def action(wave: Wave, threads: Threads) -> None:
        space = _space(code, wave, 1)
        values = wave.memory.load(
            space, address(wave, threads), type_.bits // 8, len(writes), threads, code.instruction
        )
        for write, value in zip(writes, values, strict=True):
            write(wave, threads, value.view(type_.dtype))

    return action


@decodes("st")
def st(code: Code) -> Action:
    type_, address = _value_type(code).raw, code.address(0)
    reads = code.read_each(1, type_)
    if len(reads) != code.instruction.vector:
        raise UnsupportedError(code.instruction.text)

    def action(wave: Wave, threads: Threads) -> None:
        values = [read(wave, threads) for read in reads]
        wave.memory.store(_space(code, wave, 0), address(wave, threads), values, threads, code.instruction)

    return action
