"""mma.sync m16n8: exact products, one float64 sum, one rounding. Hardware accumulates with truncation: do not expect
its bits.

Fragments (PTX ISA, "Matrix fragments for mma"): with g = lane / 4, t = lane % 4 and p elements in a register,
register i of A holds row g + 8*(i % 2) and columns p*t + 4p*(i / 2) on; register i of B rows p*t + 4p*i on of column
g; element i of the accumulator row g + 8*(i / 2), column 2*t + i % 2.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..errors import UnsupportedError
from ..formats import bf16_to_f32
from ..operands import Action, Reader, Threads
from ..types import B32

if TYPE_CHECKING:
    from ..wave import Wave

ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "s32": 32, "s8": 8, "u8": 8}
_DEPTHS = {"bf16": (8, 16), "f16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32)}
_VIEWS = {"f16": np.float16, "f32": np.float32, "s32": np.int32, "s8": np.int8, "u8": np.uint8}


def matrix_shape(code: Code) -> tuple[int, int, int]:
    shape = next((match for part in code.parts if (match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part))), None)
    if shape is None:
        raise UnsupportedError(code.instruction.text)
    rows, columns, depth = (int(length) for length in shape.groups())
    return rows, columns, depth


def decode_elements(words: Any, element: str) -> Any:
    """uint32 words to float64 elements, the low bits first."""
    if element == "bf16":
        return bf16_to_f32(words.view(np.uint16)).astype(np.float64)
    if element == "tf32":  # the hardware does not look at the low 13 bits
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return words.view(_VIEWS[element]).astype(np.float64)


def encode_elements(values: Any, element: str) -> Any:
    """Sums to elements as uint32 words; integers wrap."""
    if element == "s32":
        return (values.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
    return np.ascontiguousarray(values.astype(_VIEWS[element])).view(np.uint32)


def stack_registers(wave: Wave, threads: Threads, reads: list[Reader]) -> Any:
    """[warps, 32 lanes, registers]"""
    count = wave.count(threads)
    words = [np.broadcast_to(read(wave, threads), count).reshape(-1, 32) for read in reads]
    return np.ascontiguousarray(np.stack(words, axis=-1))


def _places(fragment: str, per_register: int, rows: int, columns: int) -> Any:
    """[rows, columns]: where each element lies among [32 lanes, registers, elements], flattened."""
    registers = rows * columns // (32 * per_register)
    lane, register, part = np.meshgrid(np.arange(32), np.arange(registers), np.arange(per_register), indexing="ij")
    g, t = lane >> 2, lane & 3
    if fragment == "a":
        row, column = g + 8 * (register % 2), per_register * (t + 4 * (register // 2)) + part
    elif fragment == "b":
        row, column = per_register * (t + 4 * register) + part, g
    else:
        element = register * per_register + part
        row, column = g + 8 * (element // 2), 2 * t + element % 2
    places = np.empty((rows, columns), np.int64)
    places[row, column] = np.arange(lane.size).reshape(lane.shape)
    return places


@decodes("mma")
def mma(code: Code) -> Action:
    rows, columns, depth = matrix_shape(code)
    d_type, a_type, b_type, c_type = code.parts[-4:]
    fits = (
        (rows, columns) == (16, 8) and depth in _DEPTHS.get(a_type, ()) and ELEMENT_BITS[a_type] == ELEMENT_BITS[b_type]
    )
    if not fits or code.has("sp") or code.has("satfinite") or not (code.has("row") and code.has("col")):
        raise UnsupportedError(code.instruction.text)
    per_register = 32 // ELEMENT_BITS[a_type]
    shapes = {"a": (rows, depth), "b": (depth, columns), "c": (rows, columns)}
    elements = {"a": a_type, "b": b_type, "c": c_type}
    reads = {name: code.read_each(i, B32) for i, name in enumerate(shapes, 1)}
    places = {name: _places(name, 32 // ELEMENT_BITS[elements[name]], *shape) for name, shape in shapes.items()}
    writes = code.write_each(0, B32)
    back = np.argsort(_places("c", 32 // ELEMENT_BITS[d_type], rows, columns), axis=None)
    assert len(reads["a"]) * 32 * per_register == rows * depth
    code.collective()

    def action(wave: Wave, threads: Threads) -> None:
        def matrix(name: str) -> Any:
            words = stack_registers(wave, threads, reads[name])
            return decode_elements(words, elements[name]).reshape(words.shape[0], -1)[:, places[name]]

        result = np.matmul(matrix("a"), matrix("b")) + matrix("c")
        wave.statistics.warp_mma += result.shape[0]
        words = encode_elements(result.reshape(result.shape[0], -1)[:, back], d_type).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(wave, threads, words[:, i])

    return action
