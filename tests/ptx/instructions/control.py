"""Instructions that move no data: fences, hints, traps, and calls out of the module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..errors import PTXError, UnsupportedError
from ..operands import Action, Threads
from ..types import U64

if TYPE_CHECKING:
    from ..wave import Wave


@decodes("membar", "fence")
def fence(code: Code) -> Action:
    """Counts where it reaches beyond the block: what the block stored before, others may read."""
    if not {"gl", "sys", "gpu"} & set(code.parts):
        return _nothing
    return lambda wave, threads: wave.memory.sharing.fence(wave.block_of(threads))


def _nothing(wave: Any, threads: Threads) -> None:
    pass


@decodes(*["nanosleep", "pmevent", "prefetch", "prefetchu", "griddepcontrol", "setmaxnreg", "discard", "applypriority"])
def hint(code: Code) -> Action:
    return _nothing


@decodes("createpolicy")
def createpolicy(code: Code) -> Action:
    write = code.write(0, U64)
    return lambda wave, threads: write(wave, threads, np.uint64(0))


@decodes("trap", "brkpt")
def trap(code: Code) -> Action:
    def action(wave: Wave, threads: Threads) -> None:
        raise PTXError(f"{code.name} executed by {wave.describe(threads)}")

    return action


@decodes("call_extern")
def call_extern(code: Code) -> Action:
    """assert ends the launch, printf is ignored, anything else cannot be run."""
    name = code.parts[1]

    def action(wave: Wave, threads: Threads) -> None:
        if "assert" in name:
            raise PTXError(f"device assert failed ({name}) in {wave.describe(threads)}")
        if name != "vprintf":
            raise UnsupportedError(f"call to external function {name}")
        wave.findings.note("printf", code.instruction, "")

    return action
