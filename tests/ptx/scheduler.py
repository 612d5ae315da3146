"""Which threads run next: the front that is furthest behind, so that what diverged meets again.

A front is a set of threads at one instruction. It runs until it ends, blocks, or reaches the next front, which it
joins. In lockstep all warps advance together; the other schedules take warp by warp (the same warp of all resident
blocks at once).
"""

from __future__ import annotations

import sys

import numpy as np

from .barriers import Barriers
from .decode import FULL_WARP
from .errors import PTXError
from .kernel import Flow, Instruction
from .operands import Threads
from .wave import Wave, lane_bits

NO_ONE = np.empty(0, np.int64)
_WHOLE_WARP = {"mma", "wmma", "ldmatrix", "stmatrix"}


class _Fronts(dict[int, Threads]):
    """Index of the next instruction to the threads that are there."""

    def __init__(self, wave_size: int) -> None:
        super().__init__()
        self.wave_size = wave_size

    def join(self, index: int, threads: Threads) -> None:
        here = self.get(index, NO_ONE)
        if here is not None and here.size and threads is not None:
            threads = np.sort(np.concatenate([here, threads]))
        self[index] = None if threads is not None and threads.size == self.wave_size else threads


class Scheduler:
    def __init__(self, wave: Wave) -> None:
        self.wave, self.barriers, self.steps = wave, Barriers(wave), 0

    def run(self) -> None:
        wave, schedule = self.wave, self.wave.options.schedule
        whole = schedule == "lockstep"
        groups = [0] if whole else list(range(wave.warps_per_block))
        if schedule == "warp_rev":
            groups.reverse()
        random = np.random.default_rng(wave.options.seed)
        ready = {group: _Fronts(wave.size) for group in groups}

        def enqueue(slots: np.ndarray, index: np.ndarray) -> None:
            group = np.zeros_like(slots) if whole else wave.thread[slots] >> 5
            for g in np.unique(group):
                for i in np.unique(index[group == g]):
                    ready[int(g)].join(int(i), slots[(group == g) & (index == i)])

        everyone = np.flatnonzero(wave.alive)
        enqueue(everyone, np.zeros_like(everyone))
        while True:
            if schedule == "warp_rand":
                random.shuffle(groups)
            ran = False
            for group in groups:
                if fronts := ready[group]:
                    ran, ready[group] = True, _Group(self, fronts).run()
            released = self.barriers.release()
            for slots, index in released:
                enqueue(slots, index + 1)
            if not ran and not released:
                break
        if (self.barriers.number >= 0).any():
            raise PTXError(self.barriers.describe_deadlock())
        if wave.copies.pending:
            wave.findings.note("cp.async-not-waited", wave.copies.pending[0].instruction, "")


class _Group:
    """Threads that take turns until each has ended, waits at a barrier, or steps aside for threads that it may be
    waiting for.
    """

    def __init__(self, scheduler: Scheduler, fronts: _Fronts) -> None:
        self.scheduler, self.wave, self.fronts = scheduler, scheduler.wave, fronts
        self.instructions = self.wave.kernel.instructions
        self.gathering: dict[int, np.ndarray] = {}  # at a collective whose other lanes have not come yet
        self.aside = _Fronts(self.wave.size)
        self.backward_branches = 0

    def run(self) -> _Fronts:
        """The fronts that can go on when others have had their turn."""
        while self.fronts or self._resume_collectives():
            index = min(self.fronts)
            self._advance(index, self.fronts.pop(index))
        for index, threads in self.gathering.items():
            self.aside.join(index, threads)
        return self.aside

    def _advance(self, index: int, threads: Threads) -> None:
        statistics, limit = self.wave.statistics, min(self.fronts, default=sys.maxsize)
        while index < limit:
            instruction = self.instructions[index]
            self.scheduler.steps += 1
            statistics.steps += 1
            statistics.thread_instructions += self.wave.count(threads)
            active, rest = self._split(instruction, threads)
            if active is not None and not active.size:
                index += 1
            elif instruction.flow is Flow.STRAIGHT:
                instruction.action(self.wave, active)
                index += 1
            else:
                index, threads = self._turn(instruction, index, threads, active, rest)
                if threads is not None and not threads.size:
                    return
                limit = min(self.fronts, default=sys.maxsize)
        self.fronts.join(index, threads)

    def _split(self, instruction: Instruction, threads: Threads) -> tuple[Threads, np.ndarray]:
        """The threads whose predicate holds, and the others."""
        if instruction.predicate is None:
            return threads, NO_ONE
        holds = self.wave.get(self.wave.kernel.register_index[instruction.predicate], threads) ^ instruction.negated
        if holds.all():
            return threads, NO_ONE
        slots = self.wave.slots(threads)
        return slots[holds], slots[~holds]

    def _turn(
        self, instruction: Instruction, index: int, threads: Threads, active: Threads, rest: np.ndarray
    ) -> tuple[int, Threads]:
        """Executes what is not straight: the index to go on at, and the threads that do."""
        wave, flow = self.wave, instruction.flow
        if flow is Flow.BRANCH:
            if instruction.target <= index and self._steps_aside(instruction, active):
                self.aside.join(instruction.target, wave.slots(active).copy())
            elif not rest.size:
                return instruction.target, threads
            else:
                self.fronts.join(instruction.target, active)
        elif flow is Flow.EXIT:
            wave.alive[wave.slots(active)] = False
        elif flow is Flow.SWITCH:
            self._switch(instruction, active)
        elif flow is Flow.COLLECTIVE:
            return index + 1, self._gather(instruction, index, threads, active, rest)
        elif self.scheduler.barriers.arrive(instruction, index, active):
            return index + 1, threads
        return index + 1, rest

    def _steps_aside(self, instruction: Instruction, active: Threads) -> bool:
        """After many backward branches others get a turn: they may hold what this loop polls for."""
        wave, options = self.wave, self.wave.options
        if self.scheduler.steps > options.max_steps:
            raise PTXError(
                f"step limit {options.max_steps} exceeded (infinite loop or inter-block spin?) at '{instruction.text}' "
                f"{wave.describe(active)}"
            )
        self.backward_branches += 1
        if self.backward_branches <= options.spin or not (self.fronts or wave.alive.sum() > wave.count(active)):
            return False
        self.backward_branches = 0
        return True

    def _switch(self, instruction: Instruction, active: Threads) -> None:
        read, targets = instruction.target
        slots = self.wave.slots(active)
        choice = np.broadcast_to(read(self.wave, active), slots.shape)
        if (choice >= len(targets)).any():
            raise PTXError(f"brx.idx out of its table: {instruction.text} {self.wave.describe(active)}")
        for i in np.unique(choice):
            self.fronts.join(targets[int(i)], slots[choice == i])

    def _gather(
        self, instruction: Instruction, index: int, threads: Threads, active: Threads, rest: np.ndarray
    ) -> Threads:
        """Runs a collective for the warps whose lanes are all there; the others wait for theirs."""
        early = self.gathering.pop(index, NO_ONE)
        if early.size:
            active = np.sort(np.concatenate([early, self.wave.slots(active)]))
        complete = self._complete(instruction, active)
        if complete is None:
            instruction.action(self.wave, active)
            return threads if not early.size else np.sort(np.concatenate([self.wave.slots(active), rest]))
        slots = self.wave.slots(active)
        if complete.any():
            instruction.action(self.wave, slots[complete])
        self.gathering[index] = slots[~complete]
        return np.sort(np.concatenate([slots[complete], rest]))

    def _complete(self, instruction: Instruction, threads: Threads) -> np.ndarray | None:
        """Which of the threads have all living lanes of their mask beside them; None: all."""
        wave, mask = self.wave, instruction.mask(self.wave, threads)
        if threads is None and np.ndim(mask) == 0 and mask == FULL_WARP:
            return None
        slots = wave.slots(threads)
        alive = lane_bits(wave.alive)[slots >> 5]
        if instruction.name in _WHOLE_WARP and (alive != FULL_WARP).any():
            raise PTXError(f"warp not full (lanes exited or absent) at '{instruction.text}' {wave.describe(threads)}")

        def note(category: str, bad: np.ndarray) -> None:
            if bad.any():
                wave.findings.note(category, instruction, wave.describe(slots[bad]), int(bad.sum()))

        note("mask-names-absent-lane", (mask & ~alive) != 0)
        note("mask-lacks-caller", (mask >> (slots & 31).astype(np.uint32)) & np.uint32(1) == 0)
        complete = (mask & alive & ~wave.present(threads)) == 0
        return None if complete.all() else complete

    def _resume_collectives(self) -> bool:
        """With no front left: lanes that were waited for may have exited, so look again."""
        if not self.gathering or self.aside:
            return False
        for index, threads in list(self.gathering.items()):
            complete = self._complete(self.instructions[index], threads)
            resumed = threads if complete is None else threads[complete]
            if resumed.size:
                self.fronts.join(index, resumed)
                del self.gathering[index]
                if resumed.size < threads.size:
                    self.gathering[index] = np.setdiff1d(threads, resumed)
        if not self.fronts:
            index = min(self.gathering)
            raise PTXError(
                f"WARP SYNC DEADLOCK / divergent collective: {self.wave.describe(self.gathering[index])} wait at "
                f"'{self.instructions[index].text}' for lanes named in the mask that never arrive"
            )
        return True
