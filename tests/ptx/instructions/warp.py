"""What the lanes of a warp do together: shfl, vote, match, redux, elect, activemask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode import Code, decodes
from ..operands import Action, Threads
from ..types import B32, PRED, U32
from ..wave import lane_bits

if TYPE_CHECKING:
    from ..wave import Wave


@decodes("activemask")
def activemask(code: Code) -> Action:
    write = code.write(0, B32)
    return lambda wave, threads: write(wave, threads, wave.present(threads))


def _source_lanes(mode: str, lane: Any, b: Any, c: Any) -> tuple[Any, Any]:
    """The lane that each one reads, and whether it lies in its segment (else a lane reads itself)."""
    b, segment, clamp = b & 31, (c >> 8) & 31, c & 31
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - b
        valid = source >= last
    else:
        source = {"down": lane + b, "bfly": lane ^ b, "idx": (lane & segment) | (b & ~segment)}[mode]
        valid = source <= last
    return np.where(valid, source, lane), valid


@decodes("shfl")
def shfl(code: Code) -> Action:
    mode = code.parts[2]
    write, write_valid = code.write_pair(B32)
    read, read_b, read_c, mask = code.read(1, B32), code.read(2, U32), code.read(3, U32), code.collective(4)

    def action(wave: Wave, threads: Threads) -> None:
        slots = wave.slots(threads)
        lane = slots & 31
        b, c = (np.asarray(reader(wave, threads)).astype(np.int64) for reader in (read_b, read_c))
        source, valid = _source_lanes(mode, lane, b, c)
        values, executing = np.zeros(wave.size, np.uint32), np.zeros(wave.size, bool)
        values[slots], executing[slots] = read(wave, threads), True
        slot = slots - lane + source
        named = (np.asarray(mask(wave, threads)).astype(np.int64) >> source) & 1
        undefined = ~executing[slot] | (named == 0)
        if undefined.any():
            i = int(np.flatnonzero(undefined)[0])
            who = f"{wave.name_of(slots[i])} <- lane {source[i]}"
            wave.findings.note("shfl-inactive", code.instruction, who, int(undefined.sum()))
        write(wave, threads, np.where(undefined, np.uint32(0xDEADBEEF), values[slot]))
        write_valid(wave, threads, valid)

    return action


@decodes("vote")
def vote(code: Code) -> Action:
    mode = code.parts[2]
    read, mask = code.read(1, PRED), code.collective(2)
    write = code.write(0, B32 if mode == "ballot" else PRED)

    def action(wave: Wave, threads: Threads) -> None:
        slots, named = wave.slots(threads), mask(wave, threads)
        says_yes = np.zeros(wave.size, bool)
        says_yes[slots] = read(wave, threads)
        yes = lane_bits(says_yes)[slots >> 5] & named
        everyone = wave.present(threads) & named
        outcome = {"ballot": yes, "any": yes != 0, "all": yes == everyone, "uni": (yes == 0) | (yes == everyone)}
        write(wave, threads, outcome[mode])

    return action


def _groups(wave: Wave, threads: Threads, mask: Any) -> Any:
    """One number for each lane: equal for the lanes of a warp that name the same mask."""
    return ((wave.slots(threads) >> 5) << 32) | np.asarray(mask(wave, threads)).astype(np.int64)


_REDUCE: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@decodes("redux", kinds="u s b")
def redux(code: Code) -> Action:
    operation, type_ = _REDUCE[code.parts[2]], code.type
    read, mask, write = code.read(1, type_), code.collective(2), code.write(0, type_)

    def action(wave: Wave, threads: Threads) -> None:
        values = np.broadcast_to(read(wave, threads), wave.count(threads))
        groups, member = np.unique(_groups(wave, threads, mask), return_inverse=True)
        totals = [operation.reduce(values[member == group], dtype=values.dtype) for group in range(groups.size)]
        write(wave, threads, np.array(totals, values.dtype)[member])

    return action


@decodes("match")
def match(code: Code) -> Action:
    """The lanes that hold the same value; .all: every lane and true, if all hold the same."""
    everyone = code.parts[1] == "all"
    write, write_all = code.write_pair(B32)
    read, mask = code.read(1, code.type), code.collective(2)

    def action(wave: Wave, threads: Threads) -> None:
        slots = wave.slots(threads)
        values = np.broadcast_to(read(wave, threads), slots.shape)
        groups, result, agree = (
            _groups(wave, threads, mask),
            np.zeros(slots.shape, np.uint32),
            np.zeros(slots.shape, bool),
        )
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            equal = values[members, None] == values[None, members]
            result[members] = (equal << (slots[members] & 31)).sum(axis=1)
            agree[members] = equal.all()
        write(wave, threads, np.where(agree, result, np.uint32(0)) if everyone else result)
        write_all(wave, threads, agree)

    return action


@decodes("elect")
def elect(code: Code) -> Action:
    """The lowest lane of the mask leads."""
    write, write_leads = code.write_pair(B32)
    mask = code.collective(1)

    def action(wave: Wave, threads: Threads) -> None:
        slots = wave.slots(threads)
        _, first, member = np.unique(_groups(wave, threads, mask), return_index=True, return_inverse=True)
        leader = slots[first][member]
        write(wave, threads, leader & 31)
        write_leads(wave, threads, leader == slots)

    return action
