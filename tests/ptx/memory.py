"""Bytes that know whether they were written, and global memory: an arena with guard gaps between its allocations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .syntax import align_up
from .types import UINT

# A generic address is an offset plus the window of its space.
WINDOW_BITS = 44
WINDOW = {"shared": 1 << WINDOW_BITS, "local": 2 << WINDOW_BITS, "param": 3 << WINDOW_BITS, "global": 7 << WINDOW_BITS}
GUARD = 4096
FRESH = 0xCB  # fills global memory that nobody wrote
_WRITTEN = {width: UINT[8 * width](int("01" * width, 16)) for width in (1, 2, 4, 8)}


class Buffer:
    def __init__(self, size: int, fill: int) -> None:
        size = align_up(max(size, 16), 16)
        raw = np.empty(size + 64, np.uint8)
        start = -raw.ctypes.data % 64
        self.bytes = raw[start : start + size]
        self.bytes[:] = fill
        self.written = np.zeros(size, np.uint8)
        self._cells = {width: self.bytes.view(UINT[8 * width]) for width in _WRITTEN}
        self._marks = {width: self.written.view(UINT[8 * width]) for width in _WRITTEN}

    def cells(self, width: int) -> np.ndarray:
        """The bytes as unsigned integers of that width."""
        return self._cells[width]

    def mark(self, index: Any, width: int) -> None:
        """These cells are written."""
        self._marks[width][index] = _WRITTEN[width]

    def unwritten(self, index: Any, width: int) -> Any:
        """Whether any byte of each cell was never written."""
        return self._marks[width][index] != _WRITTEN[width]


@dataclass(frozen=True)
class Allocation:
    start: int
    end: int
    name: str
    readonly: bool


class GlobalMemory:
    """Addresses are made up: the window of global memory plus the offset in the arena."""

    def __init__(self) -> None:
        self.buffer = Buffer(1 << 16, FRESH)
        self.top = GUARD
        self.allocations: list[Allocation] = []
        self.symbols: dict[str, int] = {}  # addresses of __device__ and __constant__ variables
        self._set_bounds()

    def _set_bounds(self) -> None:
        self.starts = np.array([allocation.start for allocation in self.allocations], np.int64)
        self.ends = np.array([allocation.end for allocation in self.allocations], np.int64)
        self.readonly = np.array([allocation.readonly for allocation in self.allocations], bool)

    def allocate(self, size: int, name: str, readonly: bool, data: bytes | None, offset: int = 0) -> int:
        """offset shifts the start off a 256-byte boundary, to test what a kernel assumes of its pointers."""
        start = align_up(self.top, 256) + offset
        self.top = start + size + GUARD
        if self.top > self.buffer.bytes.size:
            larger, used = Buffer(2 * self.top, FRESH), self.buffer.bytes.size
            larger.bytes[:used], larger.written[:used] = self.buffer.bytes, self.buffer.written
            self.buffer = larger
        address = WINDOW["global"] + start
        self.allocations.append(Allocation(address, address + size, name, readonly))
        self._set_bounds()
        if data is not None:
            self.write(address, data)
        return address

    def write(self, address: int, data: bytes) -> None:
        place = slice(address - WINDOW["global"], address - WINDOW["global"] + len(data))
        self.buffer.bytes[place] = np.frombuffer(data, np.uint8)
        self.buffer.written[place] = 1

    def read(self, address: int, size: int) -> np.ndarray:
        start = address - WINDOW["global"]
        return self.buffer.bytes[start : start + size].copy()

    def written(self, address: int, size: int) -> np.ndarray:
        start = address - WINDOW["global"]
        return self.buffer.written[start : start + size].astype(bool)

    def describe(self, address: int) -> str:
        """The nearest allocation and where the address lies in it."""
        if not self.allocations:
            return "no allocations"
        distance = [max(one.start - address, address - one.end + 1, 0) for one in self.allocations]
        nearest = self.allocations[int(np.argmin(distance))]
        offset = address - nearest.start
        where = f"offset {offset}" if offset >= 0 else f"{-offset} before start"
        return f"{nearest.name}[{nearest.end - nearest.start} bytes] {where}"


def spread(offsets: Any, size: int, granule: int, owners: Any) -> tuple[Any, Any]:
    """The granules that accesses of that size touch, and the owner of each."""
    count = max(size // granule, 1)
    first = offsets // granule
    if count == 1:
        return first, owners
    return (first[:, None] + np.arange(count)).ravel(), np.repeat(owners, count)
