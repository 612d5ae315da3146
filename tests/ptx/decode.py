"""Instructions to actions: each family in instructions/ registers the decoders of its opcodes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedError
from .kernel import Flow, Instruction, Kernel
from .operands import Action, Reader, Threads, Writer, address, reader, writer
from .syntax import Operand, Pair, Symbol, Vector
from .types import PRED, U32, Type, parse_type


@dataclass
class Code:
    """What a decoder sees of its instruction."""

    kernel: Kernel
    instruction: Instruction

    @property
    def name(self) -> str:
        return self.instruction.parts[0]

    @property
    def parts(self) -> list[str]:
        return self.instruction.parts

    @property
    def operands(self) -> list[Operand]:
        return self.instruction.operands

    @property
    def type(self) -> Type:
        """The last type that the opcode names."""
        return parse_type(self.parts[-1])

    def has(self, modifier: str) -> bool:
        return modifier in self.parts

    def one_of(self, choices: Sequence[str], default: str = "") -> str:
        """The first part that is one of the choices."""
        found = next((part for part in self.parts[1:] if part in choices), default)
        if not found:
            raise UnsupportedError(self.instruction.text)
        return found

    @property
    def rounding(self) -> str:
        return self.one_of(("rn", "rz", "rm", "rp"), default="rn")

    def read(self, index: int, type_: Type) -> Reader:
        return reader(self.kernel, self.operands[index], type_)

    def write(self, index: int, type_: Type) -> Writer:
        return writer(self.kernel, self.operands[index], type_)

    def items(self, index: int) -> Sequence[Operand]:
        """The parts of a vector or a pair; a plain operand is a vector of one."""
        operand = self.operands[index]
        return operand.items if isinstance(operand, (Vector, Pair)) else (operand,)

    def read_each(self, index: int, type_: Type) -> list[Reader]:
        return [reader(self.kernel, operand, type_) for operand in self.items(index)]

    def write_each(self, index: int, type_: Type) -> list[Writer]:
        return [writer(self.kernel, operand, type_) for operand in self.items(index)]

    def write_pair(self, type_: Type) -> tuple[Writer, Writer]:
        """The writers of `d|p`; p may be missing."""
        result, *rest = self.items(0)
        predicate = writer(self.kernel, rest[0], PRED) if rest else lambda wave, threads, value: None
        return writer(self.kernel, result, type_), predicate

    def address(self, index: int) -> Reader:
        return address(self.kernel, self.operands[index])

    def elementwise(self, function: Callable[..., Any], result: Type, *operands: Type) -> Action:
        """d = function(a, b, ...): thread by thread, without a look at the others."""
        write = self.write(0, result)
        reads = [self.read(index, type_) for index, type_ in enumerate(operands, 1)]

        def action(wave: Any, threads: Threads) -> None:
            write(wave, threads, function(*[read(wave, threads) for read in reads]))

        return action

    def collective(self, mask: int | None = None) -> Reader:
        """Makes the scheduler gather the lanes that the mask operand names (no operand: the whole warp)."""
        self.instruction.flow = Flow.COLLECTIVE
        self.instruction.mask = self.read(mask, U32) if mask is not None else lambda wave, threads: FULL_WARP
        return self.instruction.mask


FULL_WARP = U32.dtype(0xFFFFFFFF)
Decoder = Callable[[Code], Action]
_DECODERS: dict[tuple[str, str], Decoder] = {}
NEVER_A_TYPE = ""


def decodes(*names: str, kinds: str = NEVER_A_TYPE) -> Callable[[Decoder], Decoder]:
    """Registers a decoder for these opcodes, for all types or only for those whose kind is in the space-separated
    list.
    """

    def register(decoder: Decoder) -> Decoder:
        for name in names:
            for kind in kinds.split() or [NEVER_A_TYPE]:
                assert (name, kind) not in _DECODERS, (name, kind)
                _DECODERS[name, kind] = decoder
        return decoder

    return register


def _decoder_of(code: Code) -> Decoder:
    if decoder := _DECODERS.get((code.name, NEVER_A_TYPE)):
        return decoder
    if decoder := _DECODERS.get((code.name, code.type.kind)):
        return decoder
    raise UnsupportedError(f"opcode {code.name}")


def decode(kernel: Kernel) -> None:
    """Gives every instruction its action; one that is not known gets an action that raises when a thread reaches it."""
    if kernel.decoded:
        return
    for instruction in kernel.instructions:
        code = Code(kernel, instruction)
        if instruction.name in ("exit", "ret"):
            instruction.flow = Flow.EXIT
        elif instruction.name == "bra":
            instruction.flow = Flow.BRANCH
        elif instruction.name == "brx":
            instruction.flow = Flow.SWITCH
            instruction.target = (code.read(0, U32), instruction.target)
        else:
            try:
                instruction.action = _decoder_of(code)(code)
            except (UnsupportedError, KeyError, IndexError, ValueError) as error:
                instruction.flow = Flow.STRAIGHT
                instruction.problem = (
                    f"unsupported PTX instruction: {instruction.text} ({type(error).__name__}: {error})"
                )
                instruction.action = _raises(instruction.problem)
    kernel.decoded = True


def _raises(problem: str) -> Action:
    def action(wave: Any, threads: Threads) -> None:
        raise UnsupportedError(problem)

    return action


def symbol_of(operand: Operand) -> str | None:
    """The variable that an address names directly."""
    base = getattr(operand, "base", None)
    return base.name if isinstance(base, Symbol) else None
