"""Random C functions that compile for the host and for the GPU: the host compiler is the oracle of the interpreter.

Integers of every width and sign, floats, loops with a break, branches and switches. Undefined behaviour is written
around: shifts are masked, divisors are odd, signed arithmetic wraps (-fwrapv). -fmad=false and -ffp-contract=off keep
both sides from fusing; a NaN result is compared as a NaN.
"""

from __future__ import annotations

import random

HEADER = """#include <cmath>
#include <cstdint>
typedef unsigned long long ULL;
#ifndef __CUDACC__
#define __host__
#define __device__
#endif
struct In { int a, b; unsigned c; unsigned short d; long long x; ULL y; float f, g, h; float pad; };
__host__ __device__ static inline float no_nan(float x) { return x == x ? x : 1.0f; }
"""
_INTEGERS = ("int", "unsigned", "long long", "ULL", "short", "unsigned short", "signed char", "unsigned char")
_COMPARISONS = ("<", ">", "==", "<=", "!=")


class _Expressions:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, *choices: str) -> str:
        return self.random.choice(choices)

    def integer(self, depth: int) -> str:
        random_, pick = self.random, self.pick
        if depth == 0:
            literals = (
                str(random_.randrange(-200, 200)),
                f"{random_.getrandbits(31)}u",
                f"{random_.getrandbits(62)}ull",
            )
            return pick("a", "b", "c", "d", "x", "y", *literals)
        e = [self.integer(depth - 1) for _ in range(4)]
        return pick(
            f"((ULL)({e[0]}) {pick('+', '-', '*')} (ULL)({e[1]}))",
            f"((unsigned)({e[0]}) {pick('+', '-', '*', '&', '|', '^')} (unsigned)({e[1]}))",
            f"((ULL)({e[0]}) {pick('&', '|', '^')} (ULL)({e[1]}))",
            f"((unsigned)({e[0]}) {pick('<<', '>>')} (({e[1]}) & 31))",
            f"(({pick('long long', 'ULL')})({e[0]}) >> (({e[1]}) & 63))",
            f"(({pick('unsigned', 'ULL')})({e[0]}) {pick('/', '%')} (({pick('unsigned', 'ULL')})({e[1]}) | 1u))",
            f"((long long)(int)({e[0]}) {pick('/', '%')} ((long long)(int)({e[1]}) | 1))",
            f"(({pick(*_INTEGERS)})({e[0]}))",
            f"((int)({e[0]}) {pick(*_COMPARISONS)} (int)({e[1]}) ? ({e[2]}) : ({e[3]}))",
            f"((ULL)({e[0]}) {pick(*_COMPARISONS)} (ULL)({e[1]}) ? ({e[2]}) : ({e[3]}))",
            f"(~({e[0]}))",
            f"((long long)fminf(fmaxf({self.float_(depth - 1)}, -2e9f), 2e9f))",
        )

    def float_(self, depth: int) -> str:
        pick = self.pick
        if depth == 0:
            literals = (f"{self.random.uniform(-3, 3):.4f}f", "0.0f", "1e-39f", "1e30f")
            return pick("f", "g", "h", "(float)a", "(float)(ULL)x", "(float)(long long)y", *literals)
        e = [self.float_(depth - 1) for _ in range(4)]
        return pick(
            f"({e[0]} {pick('+', '-', '*', '/')} {e[1]})",
            f"({e[0]} {pick('+', '-', '*', '/')} {e[1]})",
            f"fmaf({e[0]}, {e[1]}, {e[2]})",
            f"sqrtf(fabsf({e[0]}))",
            f"({e[0]} {pick(*_COMPARISONS)} {e[1]} ? {e[2]} : {e[3]})",
            f"(float)((double){e[0]} {pick('+', '-', '*', '/')} (double){e[1]})",
            f"{pick('floorf', 'ceilf', 'truncf', 'rintf', 'fabsf')}({e[0]})",
            # of an absolute value: gcc folds copysign(m, 0 - x) wrongly at x = 0
            f"copysignf({e[0]}, fabsf(no_nan({e[1]})))",
            f"(float)({pick('int', 'unsigned', 'long long', 'ULL')})({self.integer(min(depth - 1, 1))})",
            f"({pick('fminf', 'fmaxf')}({e[0]}, {e[1]}) + 0.0f)",
        )

    def statement(self) -> str:
        i, pick = self.integer, self.pick
        return pick(
            f"for (int i = 0; i < (int)((ULL)({i(1)}) & 7); i++) {{ r = r * 31u + (ULL)({i(2)}); a ^= i * 77; y += r; "
            "if ((r & 15) == 3) break; }",
            f"if ({i(2)}) {{ r ^= (ULL)({i(3)}); f = fmaf(f, 1.5f, g); }} else {{ r += 7; x ^= (long long)r; }}",
            f"s = {self.float_(3)}; if (s > 0.f) {{ h = s; r += 1; }} else g = s;",
            f"switch ((unsigned)({i(1)}) & 7) {{ case 0: r += 3; break; case 1: r ^= y; break; "
            "case 2: x = -(long long)(r >> 1); break; case 3: r *= 5; break; case 4: r = ~r; break; "
            "case 5: y = r; break; default: a = a / 3; }",
        )


def source(seed: int, functions: int) -> str:
    """`dev<i>` is the kernel of function i and `host<i>` the same on the host: (const In*, ULL* two results each,
    count).
    """
    expressions = _Expressions(seed)
    parts = [HEADER]
    for i in range(functions):
        body = "\n  ".join(expressions.statement() for _ in range(3))
        parts.append(
            f"__host__ __device__ static inline void fn{i}(In q, ULL* o) {{\n"
            "  int a = q.a, b = q.b; unsigned c = q.c; unsigned short d = q.d; long long x = q.x; ULL y = q.y, r = 0;\n"
            f"  float f = q.f, g = q.g, h = q.h, s = 0;\n  {body}\n"
            f"  r ^= (ULL)({expressions.integer(4)}); s = {expressions.float_(4)};\n"
            "  union { float f; unsigned u; } w; w.f = s; o[0] = r; o[1] = s != s ? 0x7fffffffu : w.u;\n}\n"
            "#ifdef __CUDACC__\n"
            f'extern "C" __global__ void dev{i}(const In* q, ULL* o, int n) {{\n'
            f"  int t = blockIdx.x * blockDim.x + threadIdx.x; if (t < n) fn{i}(q[t], o + 2 * t);\n}}\n#else\n"
            f'extern "C" void host{i}(const In* q, ULL* o, int n) {{\n'
            f"  for (int t = 0; t < n; t++) fn{i}(q[t], o + 2 * t);\n}}\n#endif\n"
        )
    return "".join(parts)
