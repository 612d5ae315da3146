"""Races on shared memory: two threads at one place, one of them writing, and nothing that orders them.

Time is one counter that each synchronization advances. Every access is stamped with it, and for every warp v we keep,
for each warp w of its block, the time before which v knows everything w did: known[v, w]. A barrier joins what its
warps know; a __syncwarp advances known[v, v]. An earlier access of w at time t is ordered before one of v if t <
known[v, w].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .kernel import Instruction
from .memory import spread

if TYPE_CHECKING:
    from .wave import Wave

NOBODY, SEVERAL, WHOLE_WARP = -1, -2, -3  # in place of the slot of a reader


class Races:
    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.enabled = wave.options.race and wave.shared_bytes > 0
        self.clock = 0
        self.warps = wave.warps_per_block
        self.known = np.zeros((wave.block_count * self.warps, self.warps), np.int32)
        if not self.enabled:
            return
        self.granule = wave.kernel.granule("shared")
        count = wave.shared_stride * wave.block_count // self.granule
        self.writer = np.full(count, NOBODY, np.int32)
        self.write_time = np.zeros(count, np.int32)
        self.atomic_write = np.zeros(count, bool)
        self.reader = np.full(count, NOBODY, np.int32)
        self.read_time = np.full((count, self.warps), -1, np.int32)  # of each warp's last read
        self.copies = np.zeros(count, np.int16)  # cp.async under way to this place

    def warp_sync(self, slots: Any) -> None:
        self.clock += 1
        warp = np.unique(slots >> 5)
        self.known[warp, warp % self.warps] = self.clock

    def arrival(self) -> int:
        """The time up to which a warp that now arrives at a barrier gives away what it did."""
        self.clock += 1
        return self.clock

    def barrier(self, gives: Any, takes: Any, times: Any) -> None:
        """gives, takes: by warp of the wave; times: when each giver arrived."""
        shape = (-1, self.warps)
        gives, takes, times = gives.reshape(shape), takes.reshape(shape), times.reshape(shape)
        known = self.known.reshape(-1, self.warps, self.warps)
        joined = np.where(gives[:, :, None], known, 0).max(axis=1)
        joined = np.maximum(joined, np.where(gives, times, 0))
        known[:] = np.where(takes[:, :, None], np.maximum(known, joined[:, None, :]), known)

    def everyone_meets(self) -> None:
        """A barrier of all blocks at once."""
        self.clock += 1
        self.known[:] = self.clock

    def read(self, offsets: Any, size: int, slots: Any, instruction: Instruction) -> None:
        if not self.enabled:
            return
        place, slot = spread(offsets, size, self.granule, slots)
        self._after_write("RAW", place, slot, instruction)
        self._note("read-of-unfinished-cp.async", self.copies[place] > 0, place, slot, self.writer[place], instruction)
        warp, local = slot >> 5, (slot >> 5) % self.warps
        before, unordered = self.reader[place], self.read_time[place, local] >= self.known[warp, local]
        same_warp = (before == SEVERAL) | ((before >= 0) & (before >> 5 == warp))
        # ldmatrix reads for the whole warp at once, and the warp's later writes come after it
        mine = np.full_like(slot, WHOLE_WARP) if instruction.name == "ldmatrix" else slot
        mine = np.where(unordered & same_warp & (before != slot), SEVERAL, mine)
        self.reader[place] = mine
        lost = self.reader[place] != mine
        lost &= (self.reader[place] >= 0) & (self.reader[place] >> 5 == warp)
        self.reader[place[lost]] = SEVERAL
        self.read_time[place, local] = self.clock

    def write(self, offsets: Any, size: int, slots: Any, instruction: Instruction) -> None:
        if not self.enabled:
            return
        place, slot = spread(offsets, size, self.granule, slots)
        self._after_write("WAW", place, slot, instruction)
        self._after_read(place, slot, instruction)
        self._stamp(place, slot, atomic=False)

    def atomic(self, offsets: Any, size: int, slots: Any, instruction: Instruction) -> None:
        """Atomics are ordered among themselves, but not with plain accesses."""
        if not self.enabled:
            return
        place, slot = spread(offsets, size, self.granule, slots)
        plain = ~self.atomic_write[place]
        self._after_write("WAW", place[plain], slot[plain], instruction)
        self._after_read(place, slot, instruction)
        self._stamp(place, slot, atomic=True)

    def copy_starts(self, offsets: Any, size: int, slots: Any, instruction: Instruction) -> None:
        self.write(offsets, size, slots, instruction)
        if self.enabled:
            np.add.at(self.copies, spread(offsets, size, self.granule, slots)[0], np.int16(1))

    def copy_lands(self, offsets: Any, size: int, slots: Any) -> None:
        if self.enabled:
            place, slot = spread(offsets, size, self.granule, slots)
            np.add.at(self.copies, place, np.int16(-1))
            self._stamp(place, slot, atomic=False)

    def _stamp(self, place: Any, slot: Any, atomic: bool) -> None:
        self.writer[place], self.write_time[place], self.atomic_write[place] = slot, self.clock, atomic

    def _after_write(self, kind: str, place: Any, slot: Any, instruction: Instruction) -> None:
        writer = self.writer[place]
        known = self.known[slot >> 5, (writer >> 5) % self.warps]
        unordered = (writer >= 0) & (writer != slot) & (self.write_time[place] >= known)
        self._note(kind, unordered, place, slot, writer, instruction)

    def _after_read(self, place: Any, slot: Any, instruction: Instruction) -> None:
        warp, local = slot >> 5, (slot >> 5) % self.warps
        unordered = self.read_time[place] >= self.known[warp]
        reader = self.reader[place]
        own = np.take_along_axis(unordered, local[:, None], axis=1)[:, 0]
        others = unordered.sum(axis=1) > own
        own &= (reader != slot) & (reader != WHOLE_WARP)
        self._note("WAR", others, place, slot, np.where(reader >> 5 == warp, SEVERAL, reader), instruction)
        self._note("WAR", own & ~others, place, slot, np.where(reader >= 0, reader, warp * 32), instruction)

    def _note(self, kind: str, bad: Any, place: Any, slot: Any, other: Any, instruction: Instruction) -> None:
        if not bad.any():
            return
        i = int(np.flatnonzero(bad)[0])
        same_warp = other[i] >= 0 and other[i] >> 5 == slot[i] >> 5
        name = self.wave.name_of(other[i]) if other[i] >= 0 else "several threads"
        offset = int(place[i]) * self.granule % self.wave.shared_stride
        where = f"{self.wave.name_of(slot[i])} and {name} at shared offset {offset}"
        self.wave.findings.note(
            f"race-{kind}" + ("-intrawarp" if same_warp else ""), instruction, where, int(bad.sum())
        )
