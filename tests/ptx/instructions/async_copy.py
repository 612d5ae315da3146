"""cp.async: copies that land only when they are waited for (see copies.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..decode import Code, decodes
from ..errors import PTXError, UnsupportedError
from ..operands import Action, Threads, reader
from ..syntax import Immediate, Register
from ..types import PRED, U32

if TYPE_CHECKING:
    from ..wave import Wave


def _number(operand: object) -> int:
    if not isinstance(operand, Immediate):
        raise UnsupportedError(f"cp.async with {operand}")
    return int(operand.value)


@decodes("cp")
def cp_async(code: Code) -> Action:
    if code.parts[1] != "async" or code.has("bulk") or code.has("mbarrier"):
        raise UnsupportedError(code.instruction.text)
    if code.parts[2] == "commit_group":
        return lambda wave, threads: wave.copies.commit(threads)
    if code.parts[2] == "wait_group":
        newest = _number(code.operands[0])
        return lambda wave, threads: wave.copies.wait(threads, newest)
    if code.parts[2] == "wait_all":
        return lambda wave, threads: wave.copies.wait(threads, None)
    return _copy(code)


def _copy(code: Code) -> Action:
    destination, source, size = code.address(0), code.address(1), _number(code.operands[2])
    if code.has("cg") and size != 16:
        raise UnsupportedError(f"cp.async.cg takes 16 bytes: {code.instruction.text}")
    source_size = ignored = None
    for operand in code.operands[3:]:
        bits = code.kernel.registers[operand.name] if isinstance(operand, Register) else 32
        if bits == 1:
            ignored = reader(code.kernel, operand, PRED)
        elif bits == 32 and source_size is None:  # 64 bits: a cache policy
            source_size = reader(code.kernel, operand, U32)

    def action(wave: Wave, threads: Threads) -> None:
        count = wave.count(threads)
        sizes = np.asarray(source_size(wave, threads) if source_size else size).astype(np.int64)
        if (sizes > size).any():
            raise PTXError(f"cp.async reads more than it writes: {code.instruction.text} {wave.describe(threads)}")
        if ignored:
            sizes = np.where(ignored(wave, threads), 0, sizes)
        to, from_ = destination(wave, threads), source(wave, threads)
        wave.copies.issue(
            *(np.broadcast_to(x, count) for x in (to, from_, sizes)), size, wave.slots(threads), code.instruction
        )

    return action
