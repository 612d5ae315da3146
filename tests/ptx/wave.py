"""A launch, and a wave of it: the blocks that are resident together, as one array of thread slots.

Every register is a numpy array with one entry for each slot, so one step runs one instruction for many threads. A
block takes whole warps; the slots of lanes that do not exist are never alive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .access import Memory
from .banks import BankCounter
from .copies import Copies
from .errors import PTXError, UnsupportedError
from .kernel import Kernel
from .memory import GlobalMemory
from .operands import Threads
from .races import Races
from .report import Findings, Statistics
from .sharing import Sharing
from .syntax import align_up
from .traffic import TrafficCounter
from .types import UINT

MULTIPROCESSORS = 132
SCHEDULES = ("lockstep", "warp", "warp_rev", "warp_rand")
BLOCK_ORDERS = ("together", "serial", "reverse", "random")


@dataclass(frozen=True)
class Options:
    """How a launch runs, and what it checks.

    schedule: lockstep, or a warp at a time until it blocks, in order, in reverse or shuffled. block_order: together,
    or one block after the other. cp_async: its data lands lazy (at the wait) or eager (at once). race, uninit,
    sharing, traffic, banks: turn a watch off. poison fills shared and local memory (0xFF: NaN). atom_reverse: atomics
    take the threads from the last. spin: backward branches after which waiting threads get a turn. max_steps: the
    limit of a wave. max_lanes: thread slots of a wave.
    """

    schedule: str = "lockstep"
    block_order: str = "together"
    cp_async: str = "lazy"
    race: bool = True
    uninit: bool = True
    sharing: bool = True
    traffic: bool = True
    banks: bool = True
    poison: int = 0xFF
    atom_reverse: bool = False
    seed: int = 0
    spin: int = 4096
    max_steps: int = 50_000_000
    max_lanes: int = 1 << 16

    def __post_init__(self) -> None:
        choices = {"schedule": SCHEDULES, "block_order": BLOCK_ORDERS, "cp_async": ("lazy", "eager")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass
class Launch:
    kernel: Kernel
    device: GlobalMemory
    parameters: bytes
    grid: tuple[int, ...]
    block: tuple[int, ...]
    dynamic_shared: int
    options: Options

    def __post_init__(self) -> None:
        self.findings, self.statistics = Findings(), Statistics()
        self.sharing = Sharing(self.device, self.kernel.granule("global"), math.prod(self.grid))
        self.traffic, self.banks = TrafficCounter(self.device), BankCounter(self.options.banks)


class Wave:
    def __init__(self, launch: Launch, blocks: np.ndarray) -> None:
        self.launch, self.kernel, self.options = launch, launch.kernel, launch.options
        self.findings, self.statistics = launch.findings, launch.statistics
        self.blocks, self.block_count = blocks, len(blocks)
        threads = math.prod(launch.block)
        self.block_slots = align_up(threads, 32)
        self.warps_per_block = self.block_slots // 32
        self.size = self.block_count * self.block_slots
        self._all = np.arange(self.size)
        self.thread = self._all % self.block_slots  # within its block
        self.exists = self.thread < threads
        self.alive = self.exists.copy()
        self.shared_bytes = self.kernel.static_shared
        if launch.dynamic_shared:
            self.shared_bytes = self.kernel.dynamic_offset + launch.dynamic_shared
        self.shared_stride = align_up(max(self.shared_bytes, 16), 16)
        self.registers = [
            np.zeros(self.size, bool if bits == 1 else UINT[min(bits, 64)]) for bits in self.kernel.register_bits
        ]
        self._carry = np.zeros(self.size, bool)
        self._special: dict[str, Any] = {}
        self.memory, self.races, self.copies = Memory(self), Races(self), Copies(self)

    def slots(self, threads: Threads) -> np.ndarray:
        return self._all if threads is None else threads

    def count(self, threads: Threads) -> int:
        return self.size if threads is None else threads.size

    def get(self, register: int, threads: Threads) -> np.ndarray:
        return self.registers[register] if threads is None else self.registers[register][threads]

    def put(self, register: int, threads: Threads, value: Any) -> None:
        self.registers[register][slice(None) if threads is None else threads] = value

    def get_carry(self, threads: Threads) -> np.ndarray:
        return self._carry[self.slots(threads)]

    def put_carry(self, threads: Threads, carry: Any) -> None:
        self._carry[self.slots(threads)] = carry

    def block_index(self, threads: Threads) -> np.ndarray:
        """Of each thread's block, within the wave."""
        return self.slots(threads) // self.block_slots

    def block_of(self, threads: Threads) -> np.ndarray:
        """The number of each thread's block, within the grid."""
        return self.blocks[self.block_index(threads)]

    def present(self, threads: Threads) -> np.ndarray:
        """For each of the threads, which lanes of its warp are among them."""
        chosen = np.zeros(self.size, bool)
        chosen[self.slots(threads)] = True
        return lane_bits(chosen)[self.slots(threads) >> 5]

    def name_of(self, slot: int) -> str:
        block, thread = int(self.blocks[slot // self.block_slots]), int(slot % self.block_slots)
        (gx, gy, _), (bx, by, _) = self.launch.grid, self.launch.block
        return (
            f"block({block % gx},{block // gx % gy},{block // (gx * gy)}) "
            f"thread({thread % bx},{thread // bx % by},{thread // (bx * by)})"
        )

    def describe(self, threads: Threads) -> str:
        slots = self.slots(threads)
        return self.name_of(slots[0]) + (f" and {slots.size - 1} more" if slots.size > 1 else "")

    def symbol(self, name: str) -> tuple[str, int]:
        """The state space and the address of a variable."""
        if name in self.kernel.symbols:
            return self.kernel.symbols[name]
        if name in self.launch.device.symbols:
            return "global", self.launch.device.symbols[name]
        raise PTXError(f"unknown symbol {name}")

    def special(self, name: str) -> Any:
        """A special register: an array of all slots, or one number."""
        if name not in self._special:
            self._special[name] = np.asarray(self._make_special(*name.split("."))).astype(np.uint64)
        return self._special[name]

    def _make_special(self, name: str, axis: str = "x") -> Any:
        dimension, grid, block = "xyz".index(axis), self.launch.grid, self.launch.block
        lane, one = (self.thread & 31).astype(np.uint64), np.uint64(1)
        block_number = self.block_of(None)
        below = (one << lane) - one
        values: dict[str, Any] = {
            "tid": self.thread // math.prod(block[:dimension]) % block[dimension],
            "ntid": block[dimension],
            "ctaid": block_number // math.prod(grid[:dimension]) % grid[dimension],
            "nctaid": grid[dimension],
            "laneid": lane,
            "warpid": self.thread >> 5,
            "nwarpid": 64,
            "smid": block_number % MULTIPROCESSORS,
            "nsmid": MULTIPROCESSORS,
            "lanemask_eq": one << lane,
            "lanemask_lt": below,
            "lanemask_le": below | (one << lane),
            "lanemask_ge": ~below & np.uint64(0xFFFFFFFF),
            "lanemask_gt": ~(below | (one << lane)) & np.uint64(0xFFFFFFFF),
            "dynamic_smem_size": self.launch.dynamic_shared,
            "total_smem_size": self.shared_bytes,
            "gridid": 0,
        }
        if name not in values:  # clocks would make a result depend on time, clusters are not there
            raise UnsupportedError(f"special register %{name}")
        return values[name]


def lane_bits(chosen: np.ndarray) -> np.ndarray:
    """One bool for each slot to one 32-bit mask for each warp."""
    return np.packbits(chosen.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).ravel()
