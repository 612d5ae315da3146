"""From PTX text to instructions: nothing may be lost or guessed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from . import PTXError, UnsupportedError, find_kernel, kernels, launch, unsupported
from .kernel_sources import KERNELS, compile_kernels
from .launch import module_of
from .module import Module
from .syntax import (
    Immediate,
    Register,
    Symbol,
    parse_immediate,
    parse_operand,
    parse_registers,
    parse_variable,
    statements,
)

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n"


def kernel_of(body: str, head: str = "") -> str:
    return f"{HEADER}{head}\n.visible .entry k(.param .u64 k_param_0)\n{{\n{body}\nret;\n}}\n"


def run(body: str, head: str = "", threads: int = 1) -> list[int]:
    """What a body that stores %r0 as u32 at [%rd0] stores."""
    out = np.zeros(threads, np.uint32)
    prologue = ".reg .b32 %r<9>; .reg .b64 %rd<3>; .reg .pred %p<3>; ld.param.u64 %rd0, [k_param_0];"
    index = "mov.u32 %r8, %tid.x; mul.wide.u32 %rd1, %r8, 4; add.s64 %rd0, %rd0, %rd1;"
    launch(kernel_of(f"{prologue}{index}{body} st.global.u32 [%rd0], %r0;", head), "k", 1, threads, [out])
    return out.tolist()


@pytest.mark.parametrize("flags", [(), ("-lineinfo",), ("-use_fast_math",)], ids=str)
@pytest.mark.parametrize("name", sorted(file.stem for file in KERNELS.glob("*.cu")))
def test_every_statement_arrives(name: str, flags: tuple[str, ...]) -> None:
    """As many statements as semicolons; -lineinfo adds lines that are no statements."""
    ptx = compile_kernels(name, "sm_90", flags)
    for function in module_of(ptx).functions.values():
        if function.body is not None:
            plain = re.sub(r'"[^"]*"', "", function.body)
            found = [text for text in statements(function.body) if text not in "{}" and not text.endswith(":")]
            assert len(found) == plain.count(";"), function.name
    for kernel in kernels(ptx):
        assert find_kernel(ptx, kernel).instructions


def test_immediates() -> None:
    assert parse_immediate("0f3F800000") == Immediate("x", 32, 0x3F800000)
    assert parse_immediate("0dBFF0000000000000") == Immediate("x", 64, 0xBFF0000000000000)
    assert parse_immediate("-12") == Immediate("i", 64, -12)
    assert parse_immediate("0xFFU") == Immediate("i", 64, 255)
    assert parse_immediate("1.5") == Immediate("f", 64, 1.5)
    assert parse_immediate("2e3") == Immediate("f", 64, 2000.0)


def test_operands() -> None:
    assert parse_operand("[%rd1+-8]").offset == -8
    assert parse_operand("[table+12]").base == Symbol("table")
    assert parse_operand("table+4") == Symbol("table", 4)
    assert parse_operand("!%p1").operand == Register("p1")
    assert [item.name for item in parse_operand("{%f1, %f2}").items] == ["f1", "f2"]
    assert [item.name for item in parse_operand("%r1|%p2").items] == ["r1", "p2"]


def test_declarations() -> None:
    assert parse_registers(".reg .b32 %r<3>") == {"r0": 32, "r1": 32, "r2": 32}
    assert parse_registers(".reg .pred p, q") == {"p": 1, "q": 1}
    array = parse_variable(".shared .align 16 .b8 tile[4][8]")
    assert (array.space, array.size, array.align) == ("shared", 32, 16)
    table = parse_variable(".const .align 4 .b32 table[2] = {1, 0xff}")
    assert (table.size, table.initial) == (8, ["1", "0xff"])
    assert parse_variable(".extern .shared .align 16 .b8 s[]").unsized
    assert parse_variable(".reg .b32 %r<3>") is None


def test_scopes_have_their_own_registers_and_labels() -> None:
    """Inline assembly in a loop that nvcc unrolls repeats its names."""
    loop = "AGAIN: add.u32 t, t, 1; setp.lt.u32 %p0, t, 5; @%p0 bra AGAIN;"
    block = f"{{ .reg .u32 t; mov.u32 t, %r1; {loop} add.u32 %r0, %r0, t; }}"
    assert run(f"mov.u32 %r0, 0; mov.u32 %r1, 2; {block} mov.u32 %r1, 9; {block}") == [5 + 10]
    assert run(f"mov.u32 %r0, 0; mov.u32 %r1, 2; AGAIN: add.u32 %r0, %r0, 1; {block}") == [1 + 5]


def test_predicates_and_divergence() -> None:
    body = (
        "mov.u32 %r0, 7; setp.eq.u32 %p0, %r8, 1; @%p0 bra ONE; add.u32 %r0, %r0, 1; @!%p0 add.u32 %r0, %r0, 10; ONE:"
    )
    assert run(body, threads=3) == [18, 7, 18]


def test_calls_are_inlined() -> None:
    head = ".func (.param .b32 result) double(.param .b32 x)"
    body = ".reg .b32 %r<2>; ld.param.u32 %r0, [x]; shl.b32 %r1, %r0, 1; st.param.b32 [result], %r1; ret;"
    call = (
        "{{ .param .b32 a; .param .b32 b; st.param.b32 [a], {0}; call.uni (b), double, (a); ld.param.b32 {0}, [b]; }}"
    )
    assert run("mov.u32 %r0, 5;" + call.format("%r0") + call.format("%r0"), f"{head} {{ {body} }}") == [20]


def test_recursion_and_unknown_directives_raise() -> None:
    endless = ".func f() { call.uni f; ret; }"
    with pytest.raises(UnsupportedError, match="recursive"):
        run("call.uni f; mov.u32 %r0, 0;", endless)
    with pytest.raises(UnsupportedError, match="directive"):
        Module(kernel_of("")[:-2] + ".weird .b32 3;\n}\n").kernel("k")
    with pytest.raises(UnsupportedError, match="directive"):
        Module(HEADER + ".tex .u64 picture;")
    with pytest.raises(PTXError, match="text after the last statement"):
        Module(HEADER + ".global .b32 x")


def test_unknown_instruction_fails_only_where_it_is_reached() -> None:
    text = "mov.u32 %r0, 3; setp.ne.u32 %p0, %r8, 0; @%p0 tcgen05.alloc %r0, 1;"
    assert run(text) == [3]
    with pytest.raises(UnsupportedError, match=r"tcgen05\.alloc"):
        run(text, threads=2)
    assert len(unsupported(kernel_of(".reg .b32 %r<2>; wgmma.fence.sync %r0;"), "k")) == 1


def test_finding_kernels() -> None:
    ptx = compile_kernels("quantize")
    assert find_kernel(ptx, "quantize<float>").name == find_kernel(ptx, "_Z8quantizeIfEvPKT_PhPfl").name
    with pytest.raises(KeyError, match="matches"):
        find_kernel(ptx, "quantize")
    with pytest.raises(KeyError, match="matches"):
        find_kernel(ptx, "no such kernel")
