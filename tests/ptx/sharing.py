"""What blocks of one launch store and read of each other's global memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .kernel import Instruction
from .memory import GlobalMemory, spread

if TYPE_CHECKING:
    from .wave import Wave


class Sharing:
    """For each granule the block that stored it last and when; for each block its last fence."""

    def __init__(self, device: GlobalMemory, granule: int, blocks: int) -> None:
        self.granule = granule
        self.block = np.full(device.top // granule + 1, -1, np.int32)
        self.time = np.zeros(self.block.size, np.int32)
        self.fenced = np.zeros(blocks, np.int32)
        self.stored = np.zeros(len(device.allocations), bool)  # allocations that this launch stored to
        self.clock = 0

    def fence(self, blocks: Any) -> None:
        self.clock += 1
        self.fenced[blocks] = self.clock

    def read(self, offsets: Any, slots: Any, wave: Wave, instruction: Instruction) -> None:
        place = offsets // self.granule
        block = self.block[place]
        foreign = (block >= 0) & (block != wave.block_of(slots))

        def note(category: str, bad: Any) -> None:
            if bad.any():
                thread = wave.name_of(slots[np.flatnonzero(bad)[0]])
                wave.findings.note(category, instruction, thread, int(bad.sum()))

        note("global-read-of-other-blocks-write", foreign)
        note("unfenced-global-read", foreign & (self.time[place] >= self.fenced[block]))
        if "nc" in instruction.parts:
            note("ld.nc-of-written-data", block >= 0)

    def write(
        self,
        offsets: Any,
        width: int,
        changed: Any,
        needs_fence: bool,
        slots: Any,
        wave: Wave,
        instruction: Instruction,
    ) -> None:
        """changed: whether the value differs from what memory holds. A volatile or ordered store is a flag: no fence
        after it is asked for.
        """
        mine = wave.block_of(slots)
        before = self.block[offsets // self.granule]
        conflict = (before >= 0) & (before != mine) & changed
        if conflict.any():
            thread = wave.name_of(slots[np.flatnonzero(conflict)[0]])
            wave.findings.note("global-conflicting-stores", instruction, thread, int(conflict.sum()))
        place, mine = spread(offsets, width, self.granule, mine)
        self.block[place] = mine
        self.time[place] = self.clock if needs_fence else -1
