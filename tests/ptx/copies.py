"""cp.async copies: asynchronous indeed. Their data lands at the wait (lazy, the latest legal moment) or at once
(eager).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .kernel import Instruction
from .memory import WINDOW
from .operands import Threads

if TYPE_CHECKING:
    from .wave import Wave


@dataclass
class _Copy:
    """One instruction's copies, an array element for each thread. size bytes are written, those beyond `sizes` as
    zeros.
    """

    slots: Any
    to: Any  # in the wave's shared buffer
    source: Any  # in global memory
    sizes: Any
    group: Any
    size: int
    instruction: Instruction

    def part(self, chosen: Any) -> _Copy:
        fields = ("slots", "to", "source", "sizes", "group")
        return replace(self, **{name: getattr(self, name)[chosen] for name in fields})


class Copies:
    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.pending: list[_Copy] = []
        self.group = np.zeros(wave.size, np.int32)  # the number of groups each thread committed

    def issue(self, to: Any, source: Any, sizes: Any, size: int, slots: Any, instruction: Instruction) -> None:
        wave, memory = self.wave, self.wave.memory
        reads = sizes > 0
        memory.read_global(source[reads], sizes[reads], size, slots[reads], instruction)
        _, offsets, _ = memory.locate("shared", to, size, size, slots, instruction, "cp.async store")
        wave.races.copy_starts(offsets, size, slots, instruction)
        wave.launch.banks.count(to, size, slots, instruction)
        copy = _Copy(slots, offsets, source - WINDOW["global"], sizes, self.group[slots], size, instruction)
        if wave.options.cp_async == "eager":
            self._land(copy)
        else:
            self.pending.append(copy)

    def commit(self, threads: Threads) -> None:
        self.group[self.wave.slots(threads)] += 1

    def wait(self, threads: Threads, newest: int | None) -> None:
        """Lands all groups of these threads but the newest ones; None: also what is in no group yet."""
        slots = self.wave.slots(threads)
        complete = np.full(self.wave.size, -1, np.int64)  # groups below this number are
        complete[slots] = np.iinfo(np.int64).max if newest is None else self.group[slots] - newest
        still = []
        for copy in self.pending:
            lands = copy.group < complete[copy.slots]
            if lands.any():
                self._land(copy.part(lands))
            if not lands.all():
                still.append(copy.part(~lands))
        self.pending = still

    def _land(self, copy: _Copy) -> None:
        source, target = self.wave.launch.device.buffer, self.wave.memory.shared
        each = np.arange(copy.size)
        reads = each < copy.sizes[:, None]
        place = np.where(reads, copy.source[:, None] + each, 0)
        target.bytes[copy.to[:, None] + each] = np.where(reads, source.bytes[place], 0)
        target.written[copy.to[:, None] + each] = np.where(reads, source.written[place], 1)
        self.wave.races.copy_lands(copy.to, copy.size, copy.slots)
