"""ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between shared memory and the registers of a warp.

Lane 8*i + r gives the address of row r of matrix i; lane l holds the elements 2*(l % 4) and the next of row l / 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..operands import Action, Threads
from ..types import B32

if TYPE_CHECKING:
    from ..wave import Wave


def _count(code: Code) -> int:
    if not code.has("m8n8") or not code.has("b16"):
        raise UnsupportedError(code.instruction.text)
    return int(code.one_of(("x1", "x2", "x4"))[1:])


def _rows(wave: Wave, threads: Threads, addresses: Any, count: int) -> tuple[Any, Any]:
    """The addresses of the rows and the slots that give them, warp by warp."""
    addresses = np.broadcast_to(addresses, wave.count(threads)).reshape(-1, 32)
    return addresses[:, : 8 * count].ravel(), wave.slots(threads).reshape(-1, 32)[:, : 8 * count].ravel()


def _as_words(matrices: Any, transpose: bool) -> Any:
    """[..., 8, 8] elements to [..., 32] words, one for each lane."""
    if transpose:
        matrices = matrices.swapaxes(-1, -2)
    return np.ascontiguousarray(matrices).view(np.uint32).reshape(*matrices.shape[:-2], 32)


@decodes("ldmatrix")
def ldmatrix(code: Code) -> Action:
    count, transpose = _count(code), code.has("trans")
    writes, address = code.write_each(0, B32), code.address(1)
    code.collective()

    def action(wave: Wave, threads: Threads) -> None:
        rows, slots = _rows(wave, threads, address(wave, threads), count)
        words = wave.memory.load(code.instruction.space, rows, 4, 4, slots, code.instruction)
        matrices = np.stack(words, axis=1).view(np.uint16).reshape(-1, count, 8, 8)
        lanes = _as_words(matrices, transpose)
        for i, write in enumerate(writes):
            write(wave, threads, lanes[:, i].ravel())

    return action


@decodes("stmatrix")
def stmatrix(code: Code) -> Action:
    count, transpose = _count(code), code.has("trans")
    address, reads = code.address(0), code.read_each(1, B32)
    code.collective()

    def action(wave: Wave, threads: Threads) -> None:
        rows, slots = _rows(wave, threads, address(wave, threads), count)
        words = [np.broadcast_to(read(wave, threads), wave.count(threads)).reshape(-1, 32) for read in reads]
        matrices = np.stack(words, axis=1).view(np.uint16).reshape(-1, count, 8, 8)
        quarters = _as_words(matrices, transpose).reshape(-1, 4)
        wave.memory.store(code.instruction.space, rows, list(quarters.T), slots, code.instruction)

    return action
