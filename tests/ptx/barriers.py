"""Block barriers: who waits where, and when they go on.

A barrier counts warps. Without a count it waits for all of the block that still runs; with one, for count / 32 warps
that either wait (bar.sync, bar.red) or only announce themselves (bar.arrive).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PTXError
from .kernel import Instruction
from .operands import Threads

if TYPE_CHECKING:
    from .wave import Wave

BARRIERS_PER_BLOCK = 16


class Barriers:
    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.number = np.full(wave.size, -1, np.int32)  # of the barrier that a thread waits at
        self.at = np.zeros(wave.size, np.int32)  # index of the instruction
        self.vote = np.zeros(wave.size, bool)
        warps = wave.size // 32
        self.count = np.zeros((BARRIERS_PER_BLOCK, wave.block_count), np.int64)  # that its warps ask for
        self.arrived = np.zeros((BARRIERS_PER_BLOCK, warps), np.int64)  # arrivals without waiting
        self.arrival_time = np.zeros((BARRIERS_PER_BLOCK, warps), np.int64)
        self.lanes = self._lanes(wave.exists)

    @staticmethod
    def _lanes(chosen: Any) -> Any:
        """How many lanes of each warp."""
        return chosen.reshape(-1, 32).sum(axis=1)

    def arrive(self, instruction: Instruction, index: int, threads: Threads) -> bool:
        """True if the threads go on at once."""
        wave, barrier = self.wave, instruction.barrier
        slots = wave.slots(threads)
        number = np.broadcast_to(barrier.number(wave, threads), slots.shape).astype(np.int64)
        count = np.broadcast_to(barrier.count(wave, threads) if barrier.count else 0, slots.shape).astype(np.int64)
        if (number >= BARRIERS_PER_BLOCK).any() or (count % 32).any():
            raise PTXError(
                f"barrier number over 15 or count not a multiple of 32: {instruction.text} {wave.describe(threads)}"
            )
        plain = not barrier.arrives_only and barrier.reduce is None and not count.any()
        if plain and slots.size == wave.exists.sum() and (number == number[0]).all():
            wave.races.everyone_meets()
            return True
        block = wave.block_index(threads)
        before = self.count[number, block]
        if ((before != 0) & (before != count)).any():
            raise PTXError(f"threads disagree on the count of a barrier: {instruction.text} {wave.describe(threads)}")
        self.count[number, block] = count
        warps, first = np.unique(slots >> 5, return_index=True)
        self.arrival_time[number[first], warps] = wave.races.arrival()
        if barrier.arrives_only:
            self.arrived[number[first], warps] += 1
            return True
        self.number[slots], self.at[slots] = number, index
        if barrier.reduce:
            self.vote[slots] = barrier.predicate(wave, threads)
        return False

    def release(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The threads whose barrier is complete, and the index of the barrier each of them waited at."""
        waiting = np.flatnonzero(self.number >= 0)
        released = [self._release(int(number), waiting) for number in np.unique(self.number[waiting])]
        return [(slots, self.at[slots]) for slots in released if slots.size]

    def _release(self, number: int, waiting: np.ndarray) -> np.ndarray:
        wave, shape = self.wave, (self.wave.block_count, self.wave.warps_per_block)
        waits, alive = self._lanes(self.number == number), self._lanes(wave.alive)
        here = (waits > 0) & (waits == alive)
        arrived = (here + self.arrived[number]).reshape(shape).sum(axis=1)
        count = self.count[number]
        needed = np.where(count > 0, count // 32, (alive > 0).reshape(shape).sum(axis=1))
        complete = here.reshape(shape).any(axis=1) & (arrived >= needed)
        if (complete & (arrived > needed)).any():
            block = int(np.flatnonzero(complete & (arrived > needed))[0])
            raise PTXError(
                f"more warps at barrier {number} than its count of {count[block]}, block {wave.blocks[block]}"
            )
        by_warp = np.repeat(complete, wave.warps_per_block)
        takes = here & by_warp
        gives = (here | (self.arrived[number] > 0) | np.repeat(count == 0, wave.warps_per_block)) & by_warp
        wave.races.barrier(gives, takes, np.where(alive > 0, self.arrival_time[number], wave.races.clock))
        self.arrived[number, by_warp] = 0
        self.count[number, complete] = 0
        slots = waiting[(self.number[waiting] == number) & takes[waiting >> 5]]
        self._check_convergence(slots, waits)
        self._reduce(slots)
        self.number[slots] = -1
        return slots

    def _check_convergence(self, slots: np.ndarray, waits: np.ndarray) -> None:
        """All lanes of a warp must reach the same barrier instruction, and none may have left before."""
        if not slots.size:
            return
        warp, first = np.unique(slots >> 5, return_index=True)
        lowest, highest = (reduce.reduceat(self.at[slots], first) for reduce in (np.minimum, np.maximum))
        bad = (lowest != highest) | (waits[warp] != self.lanes[warp])
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            instruction = self.wave.kernel.instructions[int(highest[i])]
            self.wave.findings.note("divergent-barrier", instruction, self.wave.name_of(warp[i] * 32), int(bad.sum()))

    def _reduce(self, slots: np.ndarray) -> None:
        """bar.red gives every thread the count, the and or the or of what the block's threads said."""
        for index in np.unique(self.at[slots]):
            barrier = self.wave.kernel.instructions[int(index)].barrier
            if barrier.reduce is None:
                continue
            members = slots[self.at[slots] == index]
            block = self.wave.block_index(members)
            yes = np.bincount(block, weights=self.vote[members])[block]
            everyone = np.bincount(block)[block]
            outcome = {"popc": yes.astype(np.uint32), "and": yes == everyone, "or": yes > 0}[barrier.reduce]
            barrier.write(self.wave, members, outcome)

    def describe_deadlock(self) -> str:
        waiting = np.flatnonzero(self.number >= 0)
        groups = []
        for index in np.unique(self.at[waiting]):
            members = waiting[self.at[waiting] == index]
            text = self.wave.kernel.instructions[int(index)].text
            groups.append(f"{members.size} threads (first {self.wave.name_of(members[0])}) wait at '{text}'")
        return f"BARRIER DEADLOCK: {'; '.join(groups)}; {int(self.wave.alive.sum())} threads not exited"
