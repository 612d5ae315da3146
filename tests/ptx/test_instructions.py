"""Single instructions, as inline PTX, against the models of isa_model.py. One file of CUDA holds them all."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from . import compile_text, launch
from .isa_model import (
    M32,
    M64,
    bfe,
    bfi,
    bfind,
    bmsk,
    brev,
    byte_permute,
    clamp,
    dot2,
    dot4,
    funnel_shift,
    lop3,
    signed,
)
from .kernel_sources import bfloat16

THREADS = 256
Model = Callable[[int, int, int, int, int, int], int]


@dataclass
class Case:
    """asm sets %0 (64 bits), or t (32 bits, extended with zeros), from a, b, c, d = %1 to %4 (32 bits; b and c are
    often small) and x, y = %5, %6 (64 bits); q is the low half of x.
    """

    asm: str
    model: Model


def s32(value: int) -> int:
    return signed(value, 32)


def f32(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def f16(bits: int) -> np.float16:
    return np.uint16(bits & 0xFFFF).view(np.float16)


def bits_of(value: object) -> int:
    """Every NaN that arithmetic makes is 0x7fffffff."""
    return 0x7FFFFFFF if np.isnan(value) else int(np.float32(value).view(np.uint32))


def half_bits(value: np.float32) -> int:
    with np.errstate(over="ignore"):
        return int(np.float16(value).view(np.uint16))


def bf16_bits(value: np.float32) -> int:
    return 0x7FFF if np.isnan(value) else int(np.asarray(value).astype(bfloat16).view(np.uint16))


def flushed(bits: int) -> np.float32:
    return f32(bits if bits & 0x7F800000 else bits & 1 << 31)


CASES: dict[str, Case] = {
    "bfi.b32": Case("bfi.b32 t, %1, %4, %2, %3;", lambda a, b, c, d, x, y: bfi(a, d, b, c, 32)),
    "bfi.b64": Case("bfi.b64 %0, %5, %6, %2, %3;", lambda a, b, c, d, x, y: bfi(x, y, b, c, 64)),
    "bmsk.clamp": Case("bmsk.clamp.b32 t, %2, %3;", lambda a, b, c, d, x, y: bmsk(b, c, True)),
    "bmsk.wrap": Case("bmsk.wrap.b32 t, %2, %3;", lambda a, b, c, d, x, y: bmsk(b, c, False)),
    "brev.b32": Case("brev.b32 t, %1;", lambda a, b, c, d, x, y: brev(a, 32)),
    "brev.b64": Case("brev.b64 %0, %5;", lambda a, b, c, d, x, y: brev(x, 64)),
    "clz.b64": Case("clz.b64 t, %5;", lambda a, b, c, d, x, y: 64 - x.bit_length()),
    "popc.b64": Case("popc.b64 t, %5;", lambda a, b, c, d, x, y: x.bit_count()),
    "sad.s32": Case("sad.s32 t, %1, %4, %2;", lambda a, b, c, d, x, y: abs(s32(a) - s32(d)) + b & M32),
    "sad.u32": Case("sad.u32 t, %1, %4, %2;", lambda a, b, c, d, x, y: abs(a - d) + b & M32),
    "add.cc": Case(
        "{.reg .b32 lo,hi,t0,t1,u0,u1; mov.b64 {t0,t1}, %5; mov.b64 {u0,u1}, %6; add.cc.u32 lo, t0, u0; "
        "addc.u32 hi, t1, u1; mov.b64 %0, {lo,hi};}",
        lambda a, b, c, d, x, y: x + y & M64,
    ),
    "addc.cc": Case(  # three limbs: the middle one takes a carry and gives one
        "{.reg .b32 t0,t1; mov.b64 {t0,t1}, %5; add.cc.u32 t0, t0, %1; addc.cc.u32 t1, t1, %4; addc.u32 t, 0, 0;}",
        lambda a, b, c, d, x, y: x + (a | d << 32) >> 64,
    ),
    "sub.cc": Case(
        "{.reg .b32 lo,hi,t0,t1,u0,u1; mov.b64 {t0,t1}, %5; mov.b64 {u0,u1}, %6; sub.cc.u32 lo, t0, u0; "
        "subc.u32 hi, t1, u1; mov.b64 %0, {lo,hi};}",
        lambda a, b, c, d, x, y: x - y & M64,
    ),
    "mad.cc": Case(
        "{.reg .b32 lo,hi; mad.lo.cc.u32 lo, %1, %4, %2; madc.hi.u32 hi, %1, %4, 0; mov.b64 %0, {lo,hi};}",
        lambda a, b, c, d, x, y: a * d + b & M64,
    ),
    "mul24.lo.u32": Case("mul24.lo.u32 t, %1, %4;", lambda a, b, c, d, x, y: (a & 0xFFFFFF) * (d & 0xFFFFFF) & M32),
    "mad24.lo.s32": Case(
        "mad24.lo.s32 t, %1, %4, %2;", lambda a, b, c, d, x, y: signed(a, 24) * signed(d, 24) + b & M32
    ),
    "mul.hi.s64": Case("mul.hi.s64 %0, %5, %6;", lambda a, b, c, d, x, y: signed(x, 64) * signed(y, 64) >> 64 & M64),
    "mul.hi.s32": Case("mul.hi.s32 t, %1, %4;", lambda a, b, c, d, x, y: s32(a) * s32(d) >> 32 & M32),
    "mad.hi.u64": Case("mad.hi.u64 %0, %5, %6, 5;", lambda a, b, c, d, x, y: (x * y >> 64) + 5 & M64),
    "mad.wide.s32": Case("mad.wide.s32 %0, %1, %4, %5;", lambda a, b, c, d, x, y: s32(a) * s32(d) + x & M64),
    "add.sat.s32": Case(
        "add.sat.s32 t, %1, %4;", lambda a, b, c, d, x, y: clamp(s32(a) + s32(d), -(2**31), 2**31 - 1) & M32
    ),
    "abs.s32": Case("abs.s32 t, %1;", lambda a, b, c, d, x, y: abs(s32(a)) & M32),
    "neg.s64": Case("neg.s64 %0, %5;", lambda a, b, c, d, x, y: -x & M64),
    "div.s32": Case(
        "{.reg .s32 z; or.b32 z, %4, 1; div.s32 t, %1, z;}",
        lambda a, b, c, d, x, y: math.trunc(s32(a) / s32(d | 1)) & M32,
    ),
    "rem.u64": Case("{.reg .b64 z; or.b64 z, %6, 1; rem.u64 %0, %5, z;}", lambda a, b, c, d, x, y: x % (y | 1)),
    "cnot.b32": Case("cnot.b32 t, %2;", lambda a, b, c, d, x, y: int(b == 0)),
    "slct": Case("slct.b32.s32 t, %1, %4, %2;", lambda a, b, c, d, x, y: a if s32(b) >= 0 else d),
    "set.u32": Case("set.lt.u32.s32 t, %1, %4;", lambda a, b, c, d, x, y: M32 if s32(a) < s32(d) else 0),
    "set.f32": Case("set.hs.f32.u32 t, %1, %4;", lambda a, b, c, d, x, y: bits_of(float(a >= d))),
    "setp.and": Case(
        "{.reg .pred p,q,r; setp.lt.s32 r, %2, 30; setp.lo.and.u32 p|q, %1, %4, r; selp.b32 t, 1, 0, p; "
        "@q or.b32 t, t, 2;}",
        lambda a, b, c, d, x, y: (int(a < d) | 2 * int(a >= d)) if s32(b) < 30 else 0,
    ),
    "shl.b32": Case("shl.b32 t, %1, %2;", lambda a, b, c, d, x, y: a << b & M32 if b < 32 else 0),
    "shr.s32": Case("shr.s32 t, %1, %2;", lambda a, b, c, d, x, y: s32(a) >> min(b, 31) & M32),
    "shr.u64": Case("shr.u64 %0, %5, %2;", lambda a, b, c, d, x, y: x >> b if b < 64 else 0),
    "dp4a.s.u": Case("dp4a.s32.u32 t, %1, %4, %2;", lambda a, b, c, d, x, y: dot4(a, d, b, "s32", "u32")),
    "dp2a.hi": Case("dp2a.hi.s32.s32 t, %1, %4, %2;", lambda a, b, c, d, x, y: dot2(a, d, b, "s32", "s32", True)),
    "dp2a.lo": Case("dp2a.lo.u32.s32 t, %1, %4, %2;", lambda a, b, c, d, x, y: dot2(a, d, b, "u32", "s32", False)),
    "cvt.sat.s8.s32": Case(
        "{.reg .s32 z; cvt.sat.s8.s32 z, %1; mov.b32 t, z;}", lambda a, b, c, d, x, y: clamp(s32(a), -128, 127) & M32
    ),
    "cvt.sat.u8.s32": Case("cvt.sat.u8.s32 t, %1;", lambda a, b, c, d, x, y: clamp(s32(a), 0, 255)),
    "cvt.sat.s32.s64": Case(
        "cvt.sat.s32.s64 t, %5;", lambda a, b, c, d, x, y: clamp(signed(x, 64), -(2**31), 2**31 - 1) & M32
    ),
    "cvt.s64.s8": Case(
        "{.reg .s16 z; cvt.s8.s32 z, %1; cvt.s64.s8 %0, z;}", lambda a, b, c, d, x, y: signed(a, 8) & M64
    ),
    "cvt.rna.tf32": Case(
        "{.reg .f32 z; mov.b32 z, %1; cvt.rna.tf32.f32 t, z;}", lambda a, b, c, d, x, y: a + 0x1000 & 0xFFFFE000
    ),
    "cvt.f16x2": Case(
        "{.reg .f32 f,g; mov.b32 f, %1; mov.b32 g, %4; cvt.rn.f16x2.f32 t, f, g;}",
        lambda a, b, c, d, x, y: half_bits(f32(a)) << 16 | half_bits(f32(d)),
    ),
    "cvt.relu.bf16x2": Case(
        "{.reg .f32 f,g; mov.b32 f, %1; mov.b32 g, %4; cvt.rn.relu.bf16x2.f32 t, f, g;}",
        lambda a, b, c, d, x, y: bf16_bits(np.maximum(f32(a), 0)) << 16 | bf16_bits(np.maximum(f32(d), 0)),
    ),
    "set.f16x2": Case(
        "set.gt.f16x2.f16x2 t, %1, %4;",
        lambda a, b, c, d, x, y: sum(0x3C00 << i for i in (0, 16) if f16(a >> i) > f16(d >> i)),
    ),
    "setp.bf16x2": Case(
        "{.reg .pred p,r; setp.neu.bf16x2 p|r, %1, %4; selp.b32 t, 1, 0, p; @r or.b32 t, t, 2;}",
        lambda a, b, c, d, x, y: (
            int(f32(a << 16 & M32) != f32(d << 16 & M32)) | 2 * int(f32(a >> 16 << 16) != f32(d >> 16 << 16))
        ),
    ),
    "cvt.pack": Case(
        "cvt.pack.sat.s8.s32.b32 t, %1, %4, %2;",
        lambda a, b, c, d, x, y: (
            (b << 16 | (clamp(s32(a), -128, 127) & 255) << 8 | clamp(s32(d), -128, 127) & 255) & M32
        ),
    ),
    "cvt.pack.u16": Case(
        "cvt.pack.sat.u16.s32 t, %1, %4;",
        lambda a, b, c, d, x, y: clamp(s32(a), 0, 65535) << 16 | clamp(s32(d), 0, 65535),
    ),
    "mov.pack": Case(
        "{.reg .b16 h0,h1; mov.b32 {h0,h1}, %1; mov.b32 t, {h1,h0};}",
        lambda a, b, c, d, x, y: (a << 16 | a >> 16) & M32,
    ),
    "copysign.f32": Case(
        "{.reg .f32 f,g; mov.b32 f, %1; mov.b32 g, %4; copysign.f32 f, f, g; mov.b32 t, f;}",
        lambda a, b, c, d, x, y: a & 1 << 31 | d & 0x7FFFFFFF,
    ),
    "testp.subnormal": Case(
        "{.reg .f32 f; .reg .pred p; mov.b32 f, %1; testp.subnormal.f32 p, f; selp.b32 t, 1, 0, p;}",
        lambda a, b, c, d, x, y: int(0 < (a & 0x7FFFFFFF) < 0x800000),
    ),
    "add.ftz.f32": Case(
        "{.reg .f32 f,g; mov.b32 f, %1; mov.b32 g, %2; add.ftz.f32 g, f, g; mov.b32 t, g;}",
        lambda a, b, c, d, x, y: bits_of(flushed(a) + np.float32(0)),  # b is always subnormal here
    ),
    "isspacep": Case("{.reg .pred p; isspacep.global p, %7; selp.b32 t, 1, 0, p;}", lambda a, b, c, d, x, y: 1),
}
for _kind in "us":
    _is_signed = _kind == "s"
    CASES |= {
        f"bfe.{_kind}32": Case(
            f"bfe.{_kind}32 t, %1, %2, %3;", lambda a, b, c, d, x, y, s=_is_signed: bfe(a, b, c, 32, s)
        ),
        f"bfe.{_kind}64": Case(
            f"bfe.{_kind}64 %0, %5, %2, %3;", lambda a, b, c, d, x, y, s=_is_signed: bfe(x, b, c, 64, s)
        ),
        f"bfind.{_kind}32": Case(f"bfind.{_kind}32 t, %1;", lambda a, b, c, d, x, y, s=_is_signed: bfind(a, 32, s)),
        f"bfind.shiftamt.{_kind}64": Case(
            f"bfind.shiftamt.{_kind}64 t, %5;", lambda a, b, c, d, x, y, s=_is_signed: bfind(x, 64, s, True)
        ),
        f"min.{_kind}32": Case(
            f"min.{_kind}32 t, %1, %4;",
            lambda a, b, c, d, x, y, s=_is_signed: min(a, d, key=lambda v: s32(v) if s else v),
        ),
    }
for _mode in ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
    CASES[f"prmt.{_mode}"] = Case(
        f"prmt.b32{'.' if _mode else ''}{_mode} t, %1, %4, q;",
        lambda a, b, c, d, x, y, m=_mode: byte_permute(a, d, x & M32, m or None),
    )
for _left in (True, False):
    for _clamps in (True, False):
        CASES[f"shf.{'l' if _left else 'r'}.{'clamp' if _clamps else 'wrap'}"] = Case(
            f"shf.{'l' if _left else 'r'}.{'clamp' if _clamps else 'wrap'}.b32 t, %1, %4, %2;",
            lambda a, b, c, d, x, y, left=_left, clamps=_clamps: funnel_shift(a, d, b, left, clamps),
        )
for _table in (0xEA, 0x96, 0xCA, 0x6A, 0xE8, 0x3C):
    CASES[f"lop3.{_table:x}"] = Case(
        f"lop3.b32 t, %1, %4, q, {_table};", lambda a, b, c, d, x, y, table=_table: lop3(a, d, x & M32, table)
    )


def source() -> str:
    kernels = ["typedef unsigned long long U;"]
    for i, case in enumerate(CASES.values()):
        extend = "" if "%0" in case.asm else " cvt.u64.u32 %0, t;"
        asm = "{.reg .b32 t, q; cvt.u32.u64 q, %5; " + case.asm + extend + "}"
        inputs = ", ".join(
            [*(f'"r"(p[t * 4 + {j}])' for j in range(4)), '"l"(x[t * 2])', '"l"(x[t * 2 + 1])', '"l"(o)']
        )
        kernels.append(
            f'extern "C" __global__ void case_{i}(const unsigned* p, const U* x, U* o) {{ '
            f'int t = blockIdx.x * blockDim.x + threadIdx.x; U r; asm("{asm}" : "=l"(r) : {inputs}); o[t] = r; }}'
        )
    return "\n".join(kernels)


def operands() -> tuple[np.ndarray, np.ndarray]:
    pick = random.Random(5)

    def wide(bits: int) -> int:
        value = pick.getrandbits(bits) >> pick.randrange(bits)
        return pick.choice([value, value, value, -value % 2**bits, 0, 2**bits - 1, 2 ** (bits - 1)])

    def narrow() -> int:
        return pick.choice([pick.randrange(40), pick.randrange(33), 0, 31, 32, 63, 64, pick.randrange(256)])

    small = [[wide(32), narrow(), narrow(), wide(32)] for _ in range(THREADS)]
    return np.array(small, np.uint32), np.array([[wide(64), wide(64)] for _ in range(THREADS)], np.uint64)


@pytest.mark.parametrize("name", CASES)
def test_instruction(name: str) -> None:
    number = list(CASES).index(name)
    small, large = operands()
    out = np.zeros(THREADS, np.uint64)
    launch(compile_text(source(), "instructions"), f"case_{number}", 4, 64, [small, large, out])
    rows = zip(small.tolist(), large.tolist(), strict=True)
    with np.errstate(invalid="ignore"):
        expected = [CASES[name].model(*row, *pair) & M64 for row, pair in rows]
    assert out.tolist() == expected
