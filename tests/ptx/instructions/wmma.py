"""wmma, what nvcuda::wmma compiles to. CUDA keeps its fragments opaque, so here lane l simply holds the logical
row-major elements l*n to l*n + n - 1 of its matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..errors import PTXError, UnsupportedError
from ..operands import Action, Threads
from ..types import B32, U32, UINT
from .mma import ELEMENT_BITS, decode_elements, encode_elements, matrix_shape, stack_registers

if TYPE_CHECKING:
    from ..wave import Wave


@decodes("wmma")
def wmma(code: Code) -> Action:
    if code.parts[1] == "mma":
        return _multiply(code)
    return _Transfer(code).action


class _Transfer:
    """wmma.load and wmma.store."""

    def __init__(self, code: Code) -> None:
        rows, columns, depth = matrix_shape(code)
        self.instruction = code.instruction
        self.loads = code.parts[1] == "load"
        self.rows, self.columns = {"a": (rows, depth), "b": (depth, columns)}.get(code.parts[2], (rows, columns))
        self.row_major = code.has("row")
        self.bits = ELEMENT_BITS[code.parts[-1]]
        self.per_lane = self.rows * self.columns // 32
        self.used = self.per_lane * self.bits // 32  # sm_70 counts more registers than the data needs
        self.address = code.address(1 if self.loads else 0)
        self.registers = (code.write_each(0, B32), []) if self.loads else ([], code.read_each(1, B32))
        self.stride = code.read(2, U32) if len(code.operands) > 2 else None
        if self.used > max(map(len, self.registers)):
            raise UnsupportedError(code.instruction.text)
        code.collective()

    def _offsets(self, wave: Wave, threads: Threads, address: Any) -> Any:
        """[threads, elements]: byte offsets, after the checks that the ISA asks for."""
        size = self.bits // 8
        contiguous = self.columns if self.row_major else self.rows
        stride = np.asarray(self.stride(wave, threads) if self.stride else contiguous).astype(np.int64)
        where = f"{self.instruction.text} {wave.describe(threads)}"
        if (address.reshape(-1, 32) != address.reshape(-1, 32)[:, :1]).any():
            raise PTXError(f"wmma address differs between lanes: {where}")
        if (address & 31).any():
            raise PTXError(f"MISALIGNED wmma (32 bytes): {where}")
        if ((stride * size) & 15).any():
            raise PTXError(f"wmma stride not a multiple of 16 bytes: {where}")
        index = (wave.slots(threads) & 31)[:, None] * self.per_lane + np.arange(self.per_lane)
        row, column = np.divmod(index, self.columns)
        stride = stride.reshape(-1, 1)
        return (row * stride + column if self.row_major else column * stride + row) * size

    def action(self, wave: Wave, threads: Threads) -> None:
        count = wave.count(threads)
        address = np.broadcast_to(self.address(wave, threads), count)
        places = address[:, None] + self._offsets(wave, threads, address)
        writes, reads = self.registers
        words = np.zeros((count, self.used), np.uint32)
        for i, read in enumerate(reads[: self.used]):
            words[:, i] = read(wave, threads)
        elements = words.view(UINT[self.bits])
        for j in range(self.per_lane):
            if self.loads:
                [elements[:, j]] = wave.memory.load(
                    self.instruction.space, places[:, j], self.bits // 8, 1, threads, self.instruction
                )
            else:
                wave.memory.store(self.instruction.space, places[:, j], [elements[:, j]], threads, self.instruction)
        for i, write in enumerate(writes):
            write(wave, threads, words[:, i] if i < self.used else np.uint32(0))


def _multiply(code: Code) -> Action:
    rows, columns, depth = matrix_shape(code)
    types = [part for part in code.parts[5:] if part in ELEMENT_BITS]
    d_type, c_type = types[0], types[-1]
    ab_type = types[1] if len(types) >= 3 else "f16"
    shapes = [(ab_type, rows, depth), (ab_type, depth, columns), (c_type, rows, columns)]
    reads = [
        code.read_each(i, B32)[: height * width * ELEMENT_BITS[element] // 1024]
        for i, (element, height, width) in enumerate(shapes, 1)
    ]
    writes = code.write_each(0, B32)
    code.collective()

    def action(wave: Wave, threads: Threads) -> None:
        a, b, c = (
            decode_elements(stack_registers(wave, threads, read), element).reshape(-1, height, width)
            for read, (element, height, width) in zip(reads, shapes, strict=True)
        )
        wave.statistics.warp_mma += a.shape[0]
        words = encode_elements((np.matmul(a, b) + c).reshape(wave.count(threads), -1), d_type)
        for i, write in enumerate(writes):
            write(wave, threads, words[:, i] if i < words.shape[1] else np.uint32(0))

    return action
