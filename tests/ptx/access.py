"""Loads, stores and atomics of a wave: found, checked, watched, done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PTXError, UnsupportedError
from .kernel import Instruction
from .memory import WINDOW, WINDOW_BITS, Buffer
from .operands import Threads
from .types import UINT

if TYPE_CHECKING:
    from .wave import Wave

_SPACE_OF_WINDOW = {window >> WINDOW_BITS: space for space, window in WINDOW.items()}
_ORDERED = {"volatile", "relaxed", "release", "acquire", "acq_rel", "mmio"}


class Memory:
    def __init__(self, wave: Wave) -> None:
        self.wave, self.launch, self.device = wave, wave.launch, wave.launch.device
        self.sharing, options = wave.launch.sharing, wave.options
        self.shared = Buffer(wave.shared_stride * wave.block_count, options.poison)
        self.local = Buffer(wave.kernel.local_bytes * wave.size, options.poison)
        self.parameters = Buffer(len(wave.launch.parameters), 0)
        self.parameters.bytes[: len(wave.launch.parameters)] = np.frombuffer(wave.launch.parameters, np.uint8)
        self.parameters.written[:] = 1

    def load(
        self, space: str, addresses: Any, width: int, vector: int, threads: Threads, instruction: Instruction
    ) -> list[Any]:
        """vector values of width bytes for each thread."""
        if space == "param" and np.ndim(addresses) == 0:  # the same for all: read once
            return self._load(space, np.reshape(addresses, 1), width, vector, self.wave.slots(threads)[:1], instruction)
        slots = self.wave.slots(threads)
        values = [np.empty(slots.size, UINT[8 * width]) for _ in range(vector)]
        for where, part, chosen in _by_space(space, np.broadcast_to(addresses, slots.shape)):
            loaded = self._load(where, part, width, vector, slots[chosen], instruction)
            if part.size == slots.size:
                return loaded
            for value, some in zip(values, loaded, strict=True):
                value[chosen] = some
        return values

    def store(self, space: str, addresses: Any, values: list[Any], threads: Threads, instruction: Instruction) -> None:
        slots = self.wave.slots(threads)
        values = [np.broadcast_to(value, slots.shape) for value in values]
        for where, part, chosen in _by_space(space, np.broadcast_to(addresses, slots.shape)):
            self._store(where, part, [value[chosen] for value in values], slots[chosen], instruction)

    def atomic(
        self, space: str, addresses: Any, width: int, threads: Threads, instruction: Instruction
    ) -> tuple[Buffer, Any]:
        """Where the atomic works: a buffer and the indices of its cells of that width."""
        slots = self.wave.slots(threads)
        [(space, addresses, _), *more] = _by_space(space, addresses)
        if more:
            raise UnsupportedError(f"atomic on several state spaces: {instruction.text}")
        buffer, offsets, owner = self.locate(space, addresses, width, width, slots, instruction, "atomic")
        if space == "shared":
            self.wave.races.atomic(offsets, width, slots, instruction)
        elif owner is not None:
            self.launch.traffic.count_atomics(owner)
            self._fence_of(instruction, slots)
        if self.wave.options.uninit:
            self._watch_unwritten(buffer, offsets // width, width, 1, addresses, slots, instruction)
        buffer.mark(offsets // width, width)
        return buffer, offsets // width

    def read_global(self, addresses: Any, sizes: Any, alignment: int, slots: Any, instruction: Instruction) -> None:
        """Checks and counts what a cp.async reads."""
        _, offsets, owner = self.locate("global", addresses, sizes, alignment, slots, instruction, "load")
        self._watch_global_load(offsets, sizes, 1, owner, slots, instruction)

    def locate(
        self, space: str, addresses: Any, size: Any, alignment: int, slots: Any, instruction: Instruction, what: str
    ) -> tuple[Buffer, Any, Any]:
        """The buffer, the offsets in it, and for global memory each one's allocation; raises on a bad address."""
        wave, device = self.wave, self.device
        owner = None

        def check(bad: Any, message: str) -> None:
            if bad.any():
                i = int(np.flatnonzero(bad)[0])
                raise PTXError(self._bad_access(message, space, what, addresses, size, slots, instruction, i))

        check((addresses & (alignment - 1)) != 0, "MISALIGNED")
        if space in ("global", "const"):
            owner = np.searchsorted(device.starts, addresses, "right") - 1
            if not device.allocations:
                check(owner < 0, "OUT OF BOUNDS")
            check((owner < 0) | (addresses + size > device.ends[owner]), "OUT OF BOUNDS")
            if what != "load":
                check(device.readonly[owner], "STORE TO READ-ONLY")
            return device.buffer, addresses - WINDOW["global"], owner
        limits = {"shared": wave.shared_bytes, "local": wave.kernel.local_bytes, "param": len(self.launch.parameters)}
        check((addresses < 0) | (addresses + size > limits[space]), "OUT OF BOUNDS")
        if space == "shared":
            return self.shared, wave.block_index(slots) * wave.shared_stride + addresses, owner
        if space == "local":
            return self.local, slots * wave.kernel.local_bytes + addresses, owner
        if what != "load":
            check(addresses >= 0, "STORE TO READ-ONLY")
        return self.parameters, addresses, owner

    def _bad_access(
        self,
        message: str,
        space: str,
        what: str,
        addresses: Any,
        size: Any,
        slots: Any,
        instruction: Instruction,
        i: int,
    ) -> str:
        where = int(addresses[i])
        place = f"offset {where}"
        if space == "global":
            place = f"{where & (2**64 - 1):#x} ({self.device.describe(where)})"
        if space == "shared":
            place += f" of {self.wave.shared_bytes}"
        bytes_ = int(np.broadcast_to(size, addresses.shape)[i])
        thread = self.wave.name_of(slots[i])
        return f"{message} {space} {what} of {bytes_} bytes at {place} by {thread}: {instruction.text}"

    def _load(
        self, space: str, addresses: Any, width: int, vector: int, slots: Any, instruction: Instruction
    ) -> list[Any]:
        size = width * vector
        buffer, offsets, owner = self.locate(space, addresses, size, size, slots, instruction, "load")
        if owner is not None:
            self._watch_global_load(offsets, size, vector, owner, slots, instruction)
        elif space == "shared":
            self.wave.races.read(offsets, size, slots, instruction)
            self.launch.banks.count(addresses, size, slots, instruction)
        cells, first = buffer.cells(width), offsets // width
        if self.wave.options.uninit and space != "param":
            self._watch_unwritten(buffer, first, width, vector, addresses, slots, instruction)
        return [cells[first + i] for i in range(vector)]

    def _store(self, space: str, addresses: Any, values: list[Any], slots: Any, instruction: Instruction) -> None:
        width = values[0].dtype.itemsize
        size = width * len(values)
        buffer, offsets, owner = self.locate(space, addresses, size, size, slots, instruction, "store")
        cells, first = buffer.cells(width), offsets // width
        if owner is not None:
            self._watch_global_store(offsets, values, cells, owner, slots, instruction)
        elif space == "shared":
            self.wave.races.write(offsets, size, slots, instruction)
            self.launch.banks.count(addresses, size, slots, instruction)
        for i, value in enumerate(values):
            cells[first + i] = value
            buffer.mark(first + i, width)
            if slots.size > 1 and space != "local" and (lost := cells[first + i] != value).any():
                thread = self.wave.name_of(slots[np.flatnonzero(lost)[0]])
                self.wave.findings.note("store-collision", instruction, thread, int(lost.sum()))

    def _watch_unwritten(
        self, buffer: Buffer, first: Any, width: int, vector: int, addresses: Any, slots: Any, instruction: Instruction
    ) -> None:
        bad = buffer.unwritten(first, width)
        for i in range(1, vector):
            bad |= buffer.unwritten(first + i, width)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            where = f"{self.wave.name_of(slots[i])} address {int(addresses[i]):#x}"
            self.wave.findings.note("uninit-read", instruction, where, int(bad.sum()))

    def _watch_global_load(
        self, offsets: Any, size: Any, vector: int, owner: Any, slots: Any, instruction: Instruction
    ) -> None:
        if self.wave.options.sharing and self.sharing.stored[owner].any():
            for i in range(vector):
                self.sharing.read(offsets + i * (size // vector), slots, self.wave, instruction)
        if self.wave.options.traffic:
            self.launch.traffic.count(self.launch.traffic.reads, offsets, size, owner, slots)

    def _watch_global_store(
        self, offsets: Any, values: list[Any], cells: Any, owner: Any, slots: Any, instruction: Instruction
    ) -> None:
        width = values[0].dtype.itemsize
        if self.wave.options.sharing:
            self.sharing.stored[owner] = True
            needs_fence = not _ORDERED & set(instruction.parts)
            for i, value in enumerate(values):
                place = offsets + i * width
                changed = cells[place // width] != value
                self.sharing.write(place, width, changed, needs_fence, slots, self.wave, instruction)
        if self.wave.options.traffic:
            self.launch.traffic.count(self.launch.traffic.writes, offsets, width * len(values), owner, slots)
        self._fence_of(instruction, slots)

    def _fence_of(self, instruction: Instruction, slots: Any) -> None:
        """A release orders what the block stored before, as a fence does."""
        if {"release", "acq_rel"} & set(instruction.parts):
            self.sharing.fence(self.wave.block_of(slots))


def _by_space(space: str, addresses: Any) -> Iterator[tuple[str, Any, Any]]:
    """The accesses of one instruction by state space: its name, the addresses in it, and which accesses they are."""
    if space != "generic":
        yield space, addresses, slice(None)
        return
    windows = addresses >> WINDOW_BITS
    for window in np.unique(windows):
        name = _SPACE_OF_WINDOW.get(int(window), "global")
        chosen = slice(None) if (windows == window).all() else np.flatnonzero(windows == window)
        base = 0 if name == "global" else WINDOW[name]
        yield name, addresses[chosen] - base, chosen
