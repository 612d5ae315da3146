"""Operands to closures that read or write them: for one wave and the selected threads, all in one numpy step."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .errors import PTXError, UnsupportedError
from .formats import bf16_to_f32, f32_to_bf16
from .kernel import Kernel
from .syntax import Address, Immediate, Negated, Operand, Register, Sink, Special, Symbol
from .types import UINT, Type

if TYPE_CHECKING:
    from .wave import Wave

Threads: TypeAlias = "np.ndarray | None"  # sorted slots of a wave; None means every slot
Reader = Callable[["Wave", Threads], Any]  # the values of the threads, or one scalar for all
Writer = Callable[["Wave", Threads, Any], None]
Action = Callable[["Wave", Threads], None]


def _float_of_bits(bits: int, value: int) -> float:
    return (
        struct.unpack("<f", struct.pack("<I", value))[0]
        if bits == 32
        else struct.unpack("<d", struct.pack("<Q", value))[0]
    )


def _constant(immediate: Immediate, type_: Type) -> Any:
    value = immediate.value
    if type_.kind == "p":
        return np.bool_(value)
    if type_.kind == "bf" and immediate.kind == "i":
        return bf16_to_f32(np.uint16(int(value) & 0xFFFF))
    if type_.is_float and immediate.kind != "i":
        number = _float_of_bits(immediate.bits, int(value)) if immediate.kind == "x" else value
        return type_.dtype(number)
    if immediate.kind == "f":
        return np.array(value, {16: np.float16, 32: np.float32, 64: np.float64}[type_.bits]).view(UINT[type_.bits])[()]
    return np.array(int(value) & ((1 << type_.bits) - 1), UINT[type_.bits]).view(type_.dtype)[()]


def register_of(kernel: Kernel, operand: Operand) -> int:
    if not isinstance(operand, Register):
        raise UnsupportedError(f"operand {operand}")
    if operand.name not in kernel.register_index:
        raise PTXError(f"undeclared register {operand.name}")
    return kernel.register_index[operand.name]


def reader(kernel: Kernel, operand: Operand, type_: Type) -> Reader:
    """Reads the operand as that type; a wider register gives its low bits."""
    if isinstance(operand, Negated):
        positive = reader(kernel, operand.operand, type_)
        return lambda wave, threads: ~positive(wave, threads)
    if isinstance(operand, Immediate):
        constant = _constant(operand, type_)
        return lambda wave, threads: constant
    bits_type, dtype = UINT.get(type_.bits), type_.dtype
    if isinstance(operand, Special):

        def read_special(wave: Wave, threads: Threads) -> Any:
            value = wave.special(operand.name)
            if threads is not None and np.ndim(value):
                value = value[threads]
            return value.astype(bits_type).view(dtype)

        return read_special
    if isinstance(operand, Symbol):
        mask = (1 << type_.bits) - 1

        def read_symbol(wave: Wave, threads: Threads) -> Any:
            return bits_type((wave.symbol(operand.name)[1] + operand.offset) & mask).view(dtype)

        return read_symbol
    index = register_of(kernel, operand)
    if type_.kind == "bf":
        return lambda wave, threads: bf16_to_f32(wave.get(index, threads).astype(np.uint16))
    if type_.kind == "p" or (type_.kind in ("b", "u", "h2", "bf2") and kernel.register_bits[index] == type_.bits):
        return lambda wave, threads: wave.get(index, threads)
    if kernel.register_bits[index] == type_.bits:
        return lambda wave, threads: wave.get(index, threads).view(dtype)
    return lambda wave, threads: wave.get(index, threads).astype(bits_type).view(dtype)


def writer(kernel: Kernel, operand: Operand, type_: Type) -> Writer:
    """Converts the values to that type, extends them to the register (by their sign if the type has one) and stores
    them.
    """
    if isinstance(operand, Sink):
        return lambda wave, threads, value: None
    index, dtype = register_of(kernel, operand), type_.dtype
    bits = kernel.register_bits[index]
    if type_.kind == "p":
        return lambda wave, threads, value: wave.put(index, threads, value)
    if type_.kind == "bf":
        return lambda wave, threads, value: wave.put(index, threads, f32_to_bf16(value))
    if type_.kind == "s" and bits > type_.bits:
        wide = np.dtype(f"i{bits // 8}")
        return lambda wave, threads, value: wave.put(
            index, threads, np.asarray(value).astype(dtype).astype(wide).view(UINT[bits])
        )
    raw = UINT[type_.bits]

    def write(wave: Wave, threads: Threads, value: Any) -> None:
        value = np.asarray(value)
        if value.dtype != dtype:
            # floats meet an untyped destination as their bits
            same_bits = value.dtype.kind == "f" and not type_.is_float
            value = value.view(dtype) if same_bits else value.astype(dtype)
        wave.put(index, threads, value.view(raw))

    return write


def address(kernel: Kernel, operand: Operand) -> Reader:
    """int64 addresses in the instruction's state space."""
    if not isinstance(operand, Address):
        raise UnsupportedError(f"operand {operand} where an address is expected")
    base, offset = operand.base, np.int64(operand.offset)
    if isinstance(base, Symbol):
        return lambda wave, threads: np.int64(wave.symbol(base.name)[1] + base.offset) + offset
    if isinstance(base, Immediate):
        return lambda wave, threads: np.int64(base.value) + offset
    index = register_of(kernel, base)
    wrapped = UINT[kernel.register_bits[index]](operand.offset % 2 ** kernel.register_bits[index])  # nvcc counts on it
    return lambda wave, threads: (wave.get(index, threads) + wrapped).astype(np.int64)
