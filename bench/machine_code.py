"""Reads what nvdisasm prints: kernels as basic blocks, and the loop of a kernel in which the tensor cores work."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_SECTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_\w+):$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_NEVER = ("!PT", "!UPT")


@dataclass(frozen=True)
class Instruction:
    predicate: str | None
    opcode: str  # LDG.E.64.CONSTANT
    operands: str

    @cached_property
    def name(self) -> str:
        """LDG; NOP if it can never execute: ptxas pads so."""
        return "NOP" if self.predicate in _NEVER else self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found[1] if found else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may also go on to the next instruction."""
        return self.predicate is not None or not self.operands.startswith("`(")

    @property
    def bytes(self) -> int:
        """What a lane moves, of a load or store."""
        if self.name == "LDSM":
            return 4 * int(self.opcode[-1]) if self.opcode[-1].isdigit() else 4
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((widths[part] for part in self.opcode.split(".")[1:] if part in widths), 4)


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """`every` is executed by each iteration; `sometimes` lies behind a branch, or in a loop inside this one."""

    every: list[Instruction]
    sometimes: list[Instruction]
    longest: int  # instructions on the longest way round; loops inside this one once

    @property
    def all(self) -> list[Instruction]:
        return self.every + self.sometimes


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode; global loads and asynchronous copies by the bytes of a lane, as LDG:8."""
    wide = ("LDG", "LDGSTS")
    return Counter(f"{i.name}:{i.bytes}" if i.name in wide else i.name for i in instructions)


def parse(sass: str) -> dict[str, list[Block]]:
    """The basic blocks of each kernel, by mangled name; the first is its entry."""
    name_and_text = _SECTION.split(sass)[1:]
    return {
        name: _blocks(text.splitlines()) for name, text in zip(name_and_text[::2], name_and_text[1::2], strict=True)
    }


def _blocks(lines: Sequence[str]) -> list[Block]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(*found.groups()))
    following: list[list[int]] = []
    reconvergence: dict[str, str] = {}  # of a barrier register: where BSYNC goes on
    for i, instruction in enumerate(instructions):
        target, name, after = instruction.target, instruction.name, [i + 1]
        if name == "BSSY" and target:
            reconvergence[instruction.operands.split(",")[0]] = target
        elif name in ("BRA", "JMP") or (name == "CALL" and target in labels):
            # ptxas also jumps by CALL; a call of a function, which has a name of its own, comes back.
            after = [labels[target]] if target else []
            after += [i + 1] if instruction.conditional or name == "CALL" else []
        elif name == "WARPSYNC" and target in labels:
            after.append(labels[target])
        elif name == "BSYNC" and instruction.operands in reconvergence:
            after = [labels[reconvergence[instruction.operands]]] + (after if instruction.predicate else [])
        elif name in ("EXIT", "RET", "BRX") and instruction.predicate is None:
            after = []
        following.append([j for j in after if j < len(instructions)])
    leaders = {
        0,
        *labels.values(),
        *(j for i, after in enumerate(following) if after != [i + 1] for j in (*after, i + 1)),
    }
    starts = sorted(leader for leader in leaders if leader < len(instructions))
    number = {start: i for i, start in enumerate(starts)}
    ends = [*starts[1:], len(instructions)]
    return [
        Block(instructions[start:end], [number[j] for j in following[end - 1]])
        for start, end in zip(starts, ends, strict=True)
    ]


def hot_loop(blocks: Sequence[Block]) -> Loop | None:
    """The innermost loop with tensor core instructions; of several the one with the most, then the shortest.

    The longer twin of a loop is for the ends of a tile, where bounds are checked.
    """
    predecessors = _predecessors(blocks)
    dominators = _dominators(predecessors)
    latches: dict[int, list[int]] = {}
    for i in predecessors:
        for header in blocks[i].successors:
            if dominators[i] >> header & 1:
                latches.setdefault(header, []).append(i)
    bodies = {header: _body(predecessors, header, ends) for header, ends in latches.items()}
    busy = {header: body for header, body in bodies.items() if _tensor(blocks, body)}
    innermost = [header for header, body in busy.items() if not any(other < body for other in busy.values())]
    if not innermost:
        return None
    header = max(innermost, key=lambda h: (_tensor(blocks, busy[h]), -_length(blocks, busy[h])))
    body, ends = busy[header], latches[header]
    always = {i for i in body if all(dominators[end] >> i & 1 for end in ends)}
    return Loop(
        every=[instruction for i in sorted(always) for instruction in blocks[i].instructions],
        sometimes=[instruction for i in sorted(body - always) for instruction in blocks[i].instructions],
        longest=_longest(blocks, body, header),
    )


def _length(blocks: Sequence[Block], body: Iterable[int]) -> int:
    return sum(len(blocks[i].instructions) for i in body)


def _tensor(blocks: Sequence[Block], body: Iterable[int]) -> int:
    return sum(instruction.name == "HMMA" for i in body for instruction in blocks[i].instructions)


def _predecessors(blocks: Sequence[Block]) -> dict[int, list[int]]:
    """Of the blocks that can be reached from the entry."""
    predecessors: dict[int, list[int]] = {0: []}
    pending = [0]
    while pending:
        i = pending.pop()
        for j in blocks[i].successors:
            if j not in predecessors:
                predecessors[j] = []
                pending.append(j)
            predecessors[j].append(i)
    return predecessors


def _dominators(predecessors: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Of each block, as a bit set: the blocks on every way to it from the entry."""
    everything = (1 << max(predecessors) + 1) - 1
    dominators = dict.fromkeys(sorted(predecessors), everything) | {0: 1}
    changed = True
    while changed:
        changed = False
        for i in dominators:
            common = everything if i else 0
            for j in predecessors[i]:
                common &= dominators[j]
            common |= 1 << i
            changed |= common != dominators[i]
            dominators[i] = common
    return dominators


def _body(predecessors: Mapping[int, Sequence[int]], header: int, latches: Iterable[int]) -> set[int]:
    """The natural loop: what reaches a latch without passing the header."""
    body, pending = {header}, list(latches)
    while pending:
        i = pending.pop()
        if i not in body:
            body.add(i)
            pending += predecessors[i]
    return body


def _longest(blocks: Sequence[Block], body: set[int], header: int) -> int:
    """Along forward branches."""
    longest: dict[int, int] = {}
    for i in sorted(body, reverse=True):
        onward = [longest[j] for j in blocks[i].successors if j in body and j > i]
        longest[i] = len(blocks[i].instructions) + max(onward, default=0)
    return longest[header]
