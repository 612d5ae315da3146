"""PTX text to functions and module variables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import PTXError, UnsupportedError
from .kernel import Kernel
from .syntax import Variable, parse_variable, split_commas, statements


@dataclass
class Function:
    name: str
    entry: bool
    parameters: list[Variable]
    results: list[Variable]
    attributes: str
    body: str | None


_FUNCTION = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(entry|func)\s*(\([^()]*\))?\s*([\w$]+)\s*(\([^)]*\))?([^{;]*)([{;])",
    re.S,
)


def _without_debug_data(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    # Unlike statements, these end with their line: what -lineinfo adds, and the header.
    text = re.sub(r"^[ \t]*\.(loc|file|version|target|address_size)\b[^\n]*$", "", text, flags=re.M)
    return re.sub(r"^[ \t]*\.section\b[^{\n]*\n?\s*\{[^}]*\}", "", text, flags=re.M)


def _parse_parameters(text: str | None) -> list[Variable]:
    parameters = []
    for declaration in split_commas((text or "()")[1:-1]):
        # nvcc 12.8 and later say what a pointer points to.
        plain = re.sub(r"\.ptr\b(\s*\.(global|const|shared|local|param)\b)?(\s*\.align\s+\d+)?", " ", declaration)
        variable = parse_variable(" ".join(plain.split()))
        if variable is None:
            raise UnsupportedError(f"parameter {declaration!r}")
        parameters.append(variable)
    return parameters


def _end_of_body(text: str, start: int) -> int:
    depth = 0
    for mark in re.compile(r'"[^"]*"|[{}]').finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return mark.start()
    raise PTXError("a function body never ends")


@dataclass
class Module:
    text: str
    target: str = "?"
    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    _kernels: dict[str, Kernel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if target := re.search(r"^\s*\.target\s+(\w+)", self.text, re.M):
            self.target = target.group(1)
        text = _without_debug_data(self.text)
        position, between = 0, []
        while match := _FUNCTION.search(text, position):
            between.append(text[position : match.start()])
            kind, results, name, parameters, attributes, last = match.groups()
            body, position = None, match.end()
            if last == "{":
                end = _end_of_body(text, match.end() - 1)
                body, position = text[match.end() : end], end + 1
            if body is not None or name not in self.functions:
                self.functions[name] = Function(
                    name, kind == "entry", _parse_parameters(parameters), _parse_parameters(results), attributes, body
                )
        between.append(text[position:])
        for statement in statements(" ".join(between)):
            declaration = re.sub(r"^(\.(visible|weak|common)\s+)+", "", statement)
            if (variable := parse_variable(declaration)) is None:
                raise UnsupportedError(f"directive {statement[:120]!r}")
            self.variables.append(variable)

    def entries(self) -> list[str]:
        return [name for name, function in self.functions.items() if function.entry]

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            if name not in self.entries():
                raise PTXError(f"no kernel {name}; there are {self.entries()}")
            self._kernels[name] = Kernel(self, self.functions[name])
        return self._kernels[name]
