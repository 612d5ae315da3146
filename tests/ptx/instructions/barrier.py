"""bar / barrier: block barriers, whole or of a named part of the block, and bar.warp.sync."""

from __future__ import annotations

from dataclasses import dataclass

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..kernel import Flow
from ..operands import Action, Reader, Writer
from ..types import PRED, U32


@dataclass
class Barrier:
    """Operands of one barrier instruction; reduce: popc, and, or."""

    arrives_only: bool
    number: Reader
    count: Reader | None
    reduce: str | None = None
    predicate: Reader | None = None
    write: Writer | None = None


@decodes("bar", "barrier")
def bar(code: Code) -> Action | None:
    if code.has("cluster"):
        raise UnsupportedError(code.instruction.text)
    if code.parts[1] == "warp":
        code.collective(0)
        return lambda wave, threads: wave.races.warp_sync(wave.slots(threads))
    reduction = code.has("red")
    first = 1 if reduction else 0
    has_count = len(code.operands) > (3 if reduction else 1)
    barrier = Barrier(code.has("arrive"), code.read(first, U32), code.read(first + 1, U32) if has_count else None)
    if reduction:
        barrier.reduce = code.one_of(("popc", "and", "or"))
        barrier.predicate = code.read(-1, PRED)
        barrier.write = code.write(0, U32 if barrier.reduce == "popc" else PRED)
    code.instruction.flow = Flow.BARRIER
    code.instruction.barrier = barrier
    return None
