"""Bytes and 32-byte sectors of global memory that a launch reads and writes, by allocation.

Counted as the memory system sees it: lanes of one warp that touch the same byte (or sector) in one instruction touch
it once. Caches are left out: each instruction counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import WINDOW, GlobalMemory

SECTOR = 32
_OFFSET_BITS = 40


class Flow:
    """One direction of one allocation. sectors: how many were asked for, a sector again for each instruction of each
    warp.
    """

    def __init__(self, steps: np.ndarray, start: int, sectors: int) -> None:
        self._steps, self._start, self.sectors = steps, start, sectors

    @functools.cached_property
    def times(self) -> np.ndarray:
        """How often each byte was touched."""
        return np.cumsum(self._steps, dtype=np.int32)

    @property
    def bytes(self) -> int:
        return int(self.times.sum())

    @property
    def compulsory_sectors(self) -> int:
        """How many distinct ones."""
        touched = (self._start + np.flatnonzero(self.times)) // SECTOR
        return int(np.count_nonzero(np.diff(touched, prepend=-1)))


@dataclass
class Traffic:
    """Of one allocation."""

    read: Flow
    written: Flow
    atomics: int

    def __str__(self) -> str:
        flows = [(name, flow) for name, flow in (("read", self.read), ("written", self.written)) if flow.sectors]
        parts = [
            f"{flow.bytes} bytes in {flow.sectors} sectors {name} ({flow.compulsory_sectors} distinct)"
            for name, flow in flows
        ]
        return ", ".join(parts + ([f"{self.atomics} atomics"] if self.atomics else []))


class _Direction:
    def __init__(self, device: GlobalMemory) -> None:
        self.steps = np.zeros(device.top + 1, np.int32)  # its running sum is the number of touches of each byte
        self.sectors = np.zeros(len(device.allocations), np.int64)

    def of(self, index: int, start: int, end: int) -> Flow:
        return Flow(self.steps[start:end], start, int(self.sectors[index]))


class TrafficCounter:
    def __init__(self, device: GlobalMemory) -> None:
        self.device = device
        self.reads, self.writes = _Direction(device), _Direction(device)
        self.atomics = np.zeros(len(device.allocations), np.int64)

    def count(self, direction: _Direction, offsets: Any, sizes: Any, owner: Any, slots: Any) -> None:
        """One instruction; no access crosses a sector, since each is aligned to its size."""
        warp = slots >> 5 << _OFFSET_BITS
        one = _distinct(warp | offsets)
        sizes = np.broadcast_to(sizes, offsets.shape)[one]
        np.add.at(direction.steps, offsets[one], np.int32(1))
        np.add.at(direction.steps, offsets[one] + sizes, np.int32(-1))
        one = _distinct(warp | offsets // SECTOR)
        direction.sectors += np.bincount(owner[one], minlength=direction.sectors.size)

    def count_atomics(self, owner: Any) -> None:
        self.atomics += np.bincount(owner, minlength=self.atomics.size)

    def by_allocation(self) -> dict[str, Traffic]:
        """By the allocation's name (arg0, arg1, ... for arrays given to launch); those that were not touched are left
        out.
        """
        found = {}
        for index, allocation in enumerate(self.device.allocations):
            start, end = allocation.start - WINDOW["global"], allocation.end - WINDOW["global"]
            if self.reads.sectors[index] or self.writes.sectors[index] or self.atomics[index]:
                found[allocation.name] = Traffic(
                    self.reads.of(index, start, end), self.writes.of(index, start, end), int(self.atomics[index])
                )
        return found


def _distinct(keys: Any) -> Any:
    """Which accesses are the first with their key."""
    if (np.diff(keys) > 0).all():  # coalesced: nothing to sort
        return slice(None)
    return np.unique(keys, return_index=True)[1]
