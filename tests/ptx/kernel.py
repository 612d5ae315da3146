"""One kernel: its instructions in a row with every call inlined, and the layout of its parameters and memory."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from .errors import PTXError, UnsupportedError
from .syntax import (
    Address,
    Negated,
    Operand,
    Pair,
    Register,
    Symbol,
    Variable,
    Vector,
    align_up,
    lay_out,
    parse_operand,
    parse_registers,
    parse_variable,
    split_commas,
    statements,
)
from .types import parse_type

if TYPE_CHECKING:
    from .module import Function, Module


class Flow(Enum):
    """What an instruction means to the scheduler."""

    STRAIGHT = 0
    BRANCH = 1
    EXIT = 2
    SWITCH = 3
    BARRIER = 4
    COLLECTIVE = 5


@dataclass(eq=False)
class Instruction:
    text: str
    parts: list[str]
    operands: list[Operand]
    predicate: str | None = None
    negated: bool = False
    flow: Flow = Flow.STRAIGHT
    action: Any = None  # what it does to the selected threads: (wave, threads) -> None
    target: Any = None  # of a branch: an index; of a switch: (reader, indices)
    mask: Any = None  # of a collective: the reader of its lane mask
    barrier: Any = None
    problem: str | None = None  # why it cannot run, if a thread should reach it

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def space(self) -> str:
        """The state space that the opcode names."""
        for part in self.parts[1:]:
            if (name := part.split("::")[0]) in ("global", "shared", "local", "param", "const"):
                return name
        return "generic"

    @property
    def vector(self) -> int:
        return next((int(part[1]) for part in self.parts if re.fullmatch(r"v\d", part)), 1)


class _Scope(dict[str, Operand]):
    """Names that a `{ }` gives a new meaning, and the labels in it."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: dict[str, int] = {}


@dataclass
class _Body:
    """Turns one function body into instructions of the kernel."""

    kernel: Kernel
    prefix: str = ""
    end: list[Instruction] | None = None  # jumps of an inlined `ret`; None in the kernel itself
    scopes: list[_Scope] = field(default_factory=lambda: [_Scope()])
    jumps: list[tuple[Instruction, list[_Scope]]] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)
    label: str = ""

    def add(self, body: str) -> None:
        for statement in statements(body):
            if statement == "{":
                self.scopes.append(_Scope())
            elif statement == "}":
                self.scopes.pop()
            elif re.fullmatch(r"[\w$%]+:", statement):
                self.label = statement[:-1]
                self.scopes[-1].labels[self.label] = len(self.kernel.instructions)
            elif statement.startswith("."):
                self._directive(statement)
            elif statement:
                self._instruction(statement)
        for instruction, scopes in self.jumps:
            names = [operand.name for operand in instruction.operands if isinstance(operand, Symbol)]
            targets = [self._find_label(label, scopes) for label in self.tables.get(names[-1], names[-1:])]
            instruction.target = targets if instruction.name == "brx" else targets[0]

    def _find_label(self, name: str, scopes: list[_Scope]) -> int:
        for scope in reversed(scopes):
            if name in scope.labels:
                return scope.labels[name]
        raise PTXError(f"no label {name}")

    def _directive(self, statement: str) -> None:
        kernel, scope = self.kernel, self.scopes[-1]
        if statement.startswith(".branchtargets"):
            self.tables[self.label] = split_commas(statement[len(".branchtargets") :])
        elif statement.startswith(".reg"):
            for name, bits in parse_registers(statement).items():
                own = f"{self.prefix}{name}@{len(kernel.registers)}"
                scope[name] = Register(own)
                kernel.registers[own] = bits
        elif variable := parse_variable(statement):
            if variable.space in ("local", "param"):  # the parameters of a call lie in the caller's frame
                own = f"{self.prefix}{variable.name}@{len(kernel.local)}"
                scope[variable.name] = Symbol(own)
                kernel.local.append(replace(variable, name=own, space="local"))
            elif variable.space == "shared":
                if variable.name not in [other.name for other in kernel.shared]:
                    kernel.shared.append(variable)
            else:
                raise UnsupportedError(f"{variable.space} variable inside a function: {statement}")
        elif not statement.startswith(".pragma"):
            raise UnsupportedError(f"directive {statement[:120]!r}")

    def _resolve(self, operand: Operand) -> Operand:
        """The operand with the names of its scope."""
        if isinstance(operand, (Vector, Pair)):
            return replace(operand, items=tuple(self._resolve(item) for item in operand.items))
        if isinstance(operand, Address):
            return replace(operand, base=self._resolve(operand.base))
        if isinstance(operand, Negated):
            return Negated(self._resolve(operand.operand))
        if isinstance(operand, (Register, Symbol)):
            for scope in reversed(self.scopes):
                if (meaning := scope.get(operand.name)) is not None:
                    if isinstance(operand, Symbol) and isinstance(meaning, Symbol):
                        return Symbol(meaning.name, operand.offset)
                    return meaning
        return operand

    def _instruction(self, statement: str) -> None:
        predicate, negated, code = None, False, statement
        if code.startswith("@"):
            guard, code = code[1:].split(None, 1)
            resolved = self._resolve(Register(guard.lstrip("!").lstrip("%")))
            assert isinstance(resolved, Register)
            predicate, negated = resolved.name, guard.startswith("!")
        if not (opcode := re.match(r"[a-z][\w.:]*", code)):
            raise PTXError(f"cannot parse statement {statement[:120]!r}")
        parts, rest = opcode.group().split("."), code[opcode.end() :]
        instruction = Instruction(statement, parts, [], predicate, negated)
        if parts[0] == "call":
            self._call(instruction, rest)
            return
        instruction.operands = [self._resolve(parse_operand(text)) for text in split_commas(rest)]
        if parts[0] in ("bra", "brx"):
            self.jumps.append((instruction, list(self.scopes)))
        elif parts[0] == "ret" and self.end is not None:
            instruction.parts = ["bra"]
            self.end.append(instruction)
        self.kernel.instructions.append(instruction)

    def _call(self, call: Instruction, text: str) -> None:
        match = re.fullmatch(r"\s*(?:\(([^)]*)\)\s*,)?\s*([\w$%]+)\s*(?:,\s*\(([^)]*)\))?.*", text)
        if match is None:
            raise PTXError(f"cannot parse call {call.text!r}")
        results, name, arguments = match.groups()
        function = self.kernel.module.functions.get(name)
        if function is None or function.body is None:
            call.parts = ["call_extern", name]
            self.kernel.instructions.append(call)
            return
        if self.prefix.count("/") > 24:
            raise UnsupportedError("recursive device functions")
        returns: list[Instruction] = []
        if call.predicate is not None:
            skip = Instruction(call.text, ["bra"], [], call.predicate, not call.negated)
            self.kernel.instructions.append(skip)
            returns.append(skip)
        frame = _Scope()
        for variables, operands in ((function.parameters, arguments), (function.results, results)):
            for variable, operand in zip(variables, split_commas(operands or ""), strict=True):
                frame[variable.name] = self._resolve(parse_operand(operand))
        self.kernel.calls += 1
        _Body(self.kernel, f"{self.prefix}{name}#{self.kernel.calls}/", returns, [frame, _Scope()]).add(function.body)
        for instruction in returns:
            instruction.target = len(self.kernel.instructions)


class Kernel:
    """parameter, shared and local variables have their offsets; instructions are not decoded yet (see decode.py)."""

    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.name, self.parameters = module, function.name, function.parameters
        self.registers: dict[str, int] = {}  # name to bits
        self.instructions: list[Instruction] = []
        self.shared: list[Variable] = []
        self.local: list[Variable] = []
        self.calls = 0
        self.decoded = False
        self.required_block = self._block_limit(function, "reqntid")
        self.maximum_block = math.prod(self._block_limit(function, "maxntid") or [1024])
        _Body(self).add(function.body or "")
        self.instructions.append(Instruction("exit (end of the body)", ["exit"], []))
        used = {name for instruction in self.instructions for name in _symbols(instruction.operands)}
        self.shared += [
            variable for variable in module.variables if variable.space == "shared" and variable.name in used
        ]

        self.parameter_bytes = lay_out(self.parameters)
        self.static_shared = lay_out([variable for variable in self.shared if not variable.unsized])
        dynamic = [variable for variable in self.shared if variable.unsized]
        self.dynamic_offset = align_up(self.static_shared, max([16, *(variable.align for variable in dynamic)]))
        lay_out(dynamic, self.dynamic_offset)
        self.local_bytes = align_up(lay_out(self.local), 16)
        self.symbols = {
            variable.name: (variable.space, variable.offset)
            for variable in (*self.parameters, *self.shared, *self.local)
        }
        self.register_index = {name: index for index, name in enumerate(self.registers)}
        self.register_bits = list(self.registers.values())

    @staticmethod
    def _block_limit(function: Function, directive: str) -> list[int] | None:
        match = re.search(rf"\.{directive}\s+([\d, ]+)", function.attributes)
        return [int(length) for length in match.group(1).split(",")] if match else None

    def granule(self, space: str) -> int:
        """The shortest access to that space in bytes, at most 4: what the shadows of memory are kept in."""
        sizes = [4]
        for instruction in self.instructions:
            if instruction.name in ("ld", "ldu", "st", "atom", "red", "wmma") and instruction.space in (
                space,
                "generic",
            ):
                sizes.append(parse_type(instruction.parts[-1]).bits // 8)
        return min(sizes)


def _symbols(operands: list[Operand] | tuple[Operand, ...]) -> set[str]:
    found = set()
    for operand in operands:
        if isinstance(operand, Symbol):
            found.add(operand.name)
        elif isinstance(operand, Address):
            found |= _symbols([operand.base])
        elif isinstance(operand, (Vector, Pair)):
            found |= _symbols(operand.items)
    return found
