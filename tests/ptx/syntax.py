"""The pieces that PTX text is made of: statements, operands, variable and register declarations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from .errors import PTXError, UnsupportedError
from .types import PRED, parse_type, size_of


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """kind i: an integer, f: a decimal float, x: the bits of a float of that many bits (0f3F800000)."""

    kind: str
    bits: int
    value: int | float


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter or label, with an offset in bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """d|p: a result and its predicate."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Negated:
    operand: Operand


@dataclass(frozen=True)
class Sink:
    """_: a result that nobody wants."""


Operand: TypeAlias = "Register | Immediate | Special | Symbol | Address | Vector | Pair | Negated | Sink"

SPECIAL = {
    "tid",
    "ntid",
    "ctaid",
    "nctaid",
    "laneid",
    "warpid",
    "nwarpid",
    "gridid",
    "smid",
    "nsmid",
    "clock",
    "clock_hi",
    "clock64",
    "globaltimer",
    "globaltimer_lo",
    "globaltimer_hi",
    "lanemask_eq",
    "lanemask_le",
    "lanemask_lt",
    "lanemask_ge",
    "lanemask_gt",
    "dynamic_smem_size",
    "total_smem_size",
    "clusterid",
    "nclusterid",
    "cluster_ctaid",
    "cluster_nctaid",
    "cluster_ctarank",
    "cluster_nctarank",
}


def split_commas(text: str, separator: str = ",") -> list[str]:
    """Splits at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, last] if (last := text[start:].strip()) else parts


def statements(body: str) -> Iterator[str]:
    """Statements without their `;`, labels as `name:`, and the braces of scopes alone; white space is folded."""
    start = depth = 0
    for mark in re.finditer(r'"[^"]*"|[{};:]', body):
        text, symbol = body[start : mark.start()].strip(), mark.group()
        whole = None
        if symbol in ("{", "}") and depth == 0 and not text:
            whole = symbol
        elif symbol == "{":
            depth += 1
        elif symbol == "}":
            depth -= 1
        elif symbol == ";" and depth == 0:
            whole = text
        elif symbol == ":" and re.fullmatch(r"[\w$%]+", text):
            whole = text + ":"
        if whole is not None:
            start = mark.end()
            yield " ".join(whole.split())
    if body[start:].strip():
        raise PTXError(f"text after the last statement: {body[start:].strip()[:120]!r}")


def parse_immediate(text: str) -> Immediate:
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return Immediate("x", 32 if text[1] in "fF" else 64, int(text[2:], 16))
    if re.fullmatch(r"[-+]?\d*\.\d*([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+", text):
        return Immediate("f", 64, float(text))
    return Immediate("i", 64, int(text.rstrip("Uu"), 0))


def parse_operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(parse_operand(item) for item in split_commas(text[1 : text.rindex("}")])))
    if text.startswith("["):
        inner = text[1 : text.rindex("]")].strip()
        if (sum_ := re.fullmatch(r"(.+?)\s*([-+])\s*([-+]?\w+)", inner)) and not inner[0].isdigit():
            offset = int(sum_.group(3), 0)
            return Address(parse_operand(sum_.group(1)), -offset if sum_.group(2) == "-" else offset)
        return Address(parse_operand(inner), 0)
    if "|" in text:
        return Pair(tuple(parse_operand(item) for item in text.split("|")))
    if text == "_":
        return Sink()
    if text.startswith("!"):
        return Negated(parse_operand(text[1:]))
    if text.startswith("%"):
        name = text[1:]
        return Special(name) if name.split(".")[0] in SPECIAL else Register(name)
    if text == "WARP_SZ":
        return Immediate("i", 64, 32)
    if text[0].isdigit() or text[0] in "+-.":
        return parse_immediate(text)
    if sum_ := re.fullmatch(r"([\w$]+)\s*([-+])\s*(\d+)", text):
        return Symbol(sum_.group(1), int(sum_.group(2) + sum_.group(3)))
    return Symbol(text)


@dataclass
class Variable:
    """`.shared .align 4 .b8 name[16] = {...}`; size 0 with unsized: an extern array."""

    space: str
    name: str
    type: str
    size: int
    align: int
    unsized: bool
    initial: list[str]
    offset: int = 0

    @property
    def element_size(self) -> int:
        return size_of(self.type)


_VARIABLE = re.compile(
    r"((?:\.\w+(?:::\w+)?\s+(?:\d+\s+)?)*)\.(\w+)\s+([\w$%]+)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.+))?", re.S
)


def parse_variable(text: str) -> Variable | None:
    """None if the statement declares no variable in a state space."""
    if not (match := _VARIABLE.fullmatch(text.strip())):
        return None
    qualifiers, type_name, name, dimensions, initial = match.groups()
    space = re.search(r"\.(shared|global|const|local|param)\b", qualifiers)
    if space is None:
        return None
    size = size_of(type_name)
    lengths = re.findall(r"\[\s*(\d*)\s*\]", dimensions)
    for length in lengths:
        size *= int(length or 0)
    align = re.search(r"\.align\s+(\d+)", qualifiers)
    values = split_commas((initial or "").replace("{", " ").replace("}", " "))
    return Variable(
        space=space.group(1),
        name=name,
        type=type_name,
        size=size,
        align=int(align.group(1)) if align else size_of(type_name),
        unsized="" in lengths,
        initial=values,
    )


def parse_registers(text: str) -> dict[str, int]:
    """`.reg .b32 %r<5>` or `.reg .pred p, q`: the names without their % and the bits of each."""
    match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.+)", text, re.S)
    if not match:
        raise UnsupportedError(f"register declaration {text[:120]!r}")
    type_ = parse_type(match.group(1))
    bits = 1 if type_ == PRED else type_.bits
    registers = {}
    for name in split_commas(match.group(2)):
        name = name.lstrip("%")
        if many := re.fullmatch(r"([\w$]+)<(\d+)>", name):
            registers |= {f"{many.group(1)}{i}": bits for i in range(int(many.group(2)))}
        else:
            registers[name] = bits
    return registers


def lay_out(variables: list[Variable], start: int = 0) -> int:
    """Gives each variable its offset, in order; returns the end."""
    for variable in variables:
        variable.offset = align_up(start, variable.align)
        start = variable.offset + variable.size
    return start


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def renamed(variable: Variable, name: str, space: str) -> Variable:
    return replace(variable, name=name, space=space)
