"""What CUDA C++ compiles to, beside arithmetic: calls, switches, warp functions, halves, atomics, variables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from . import Gpu, launch, launch_all_schedules
from .isa_model import M32, M64, brev, byte_permute, dot4, signed
from .kernel_sources import bfloat16, compile_kernels, constant

RESULTS = 24
COUNT = 64
X = np.random.default_rng(1).integers(-(2**31), 2**31, COUNT).astype(np.int32)
X[:8] = [0, 1, -1, 7, 2**31 - 2, -(2**31), 5, 15]


@pytest.fixture(params=["sm_80", "sm_90"])
def ptx(request: pytest.FixtureRequest) -> str:
    return compile_kernels("language", request.param)


def divide(a: int, b: int) -> int:
    """As C: towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def test_calls(ptx: str) -> None:
    out, floats = np.zeros(COUNT, np.int64), np.zeros(COUNT, np.float32)
    launch_all_schedules(ptx, "calls", 1, COUNT, lambda: [constant(X), out, floats], [1, 2])
    for t, v in enumerate(map(int, X)):
        local = [signed(v * i + (i ^ t), 32) for i in range(16)]
        local[v & 15] ^= 0x55
        assert out[t] == signed(sum(local[: (v & 7) + 8]), 32)
        total = sum(t * 1.5 + i for i in range((v & 3) + 1))
        assert floats[t] == (-total if v & 1 else total)


def test_switches(ptx: str) -> None:
    out = np.zeros(COUNT, np.int64)
    launch_all_schedules(ptx, "switches", 1, COUNT, lambda: [constant(X), out], [1])
    cases: list[Callable[[int], int]] = [
        *(lambda r: r + 11, lambda r: r * 3, lambda r: r - 77, lambda r: r ^ 0x1234),
        *(lambda r: ~r, lambda r: r << 3, lambda r: divide(r, 7), lambda r: r - 13 * divide(r, 13)),
    ]
    assert out.tolist() == [cases[v & 7](3 * v) for v in map(int, X)]


def test_integer_intrinsics(ptx: str) -> None:
    out = np.zeros((COUNT, RESULTS), np.int64)
    launch(ptx, "integers", 1, COUNT, [constant(X), out, 0])
    for t, v in enumerate(map(int, X)):
        u, square, modulus = v & M32, v * v & M64, (t & 7) + 3
        expected = [
            divide(v * signed(v + 1, 32), t + 1),
            signed(v << 33, 64) * 0x123456789ABCDEF >> 64,
            v * 77777 >> 32,
            u * 0xDEADBEEF >> 32,
            u.bit_count(),
            32 - u.bit_length(),
            (u & -u).bit_length(),
            brev(u, 32),
            square.bit_count(),
            64 - square.bit_length(),
            signed(dot4(u, 0x01FE7F80, 5, "s32", "s32"), 32),
            (t << 32 | u) << 5 >> 32 & M32,
            (t << 32 | u) >> (u & 31) & M32,
            byte_permute(u, t * 0x1010101 & M32, 0x5E2B & 0x7777),  # __byte_perm ignores the top bit of a selector
            v >> 31,
            u >> 3,
            abs(v - t) + 3 & M32,
            signed(v, 8),
            v & 0xFFFF,
            u % modulus,
            v - modulus * divide(v, modulus),
            u << (v & 31) & M32,
        ]
        assert [int(value) for value in out[t, : len(expected)]] == expected


def test_warp_functions(ptx: str) -> None:
    out = np.zeros((COUNT, RESULTS), np.uint32)
    launch_all_schedules(ptx, "warps", 1, COUNT, lambda: [constant(X), out], [1])
    for warp in range(2):
        v = [int(x) for x in X[32 * warp : 32 * warp + 32]]
        odd = [i for i in range(32) if v[i] & 1]
        for i in range(32):
            expected = {
                0: sum((x & 1) << j for j, x in enumerate(v)),
                1: int(int(X[0]) in v),
                2: int(12345 not in v),
                3: sum(1 << j for j in range(32) if v[j] & 3 == v[i] & 3),
                4: sum(v),
                5: max(v),
                6: M32 if warp == 0 else 0,
                7: int(warp == 0),
                10: v[i - 3] if i >= 3 else v[i],
                11: v[(i & 24) | ((i + 5) & 7)],
                12: v[i + 2] if (i & 15) + 2 < 16 else v[i],
                13: v[i ^ 9],
                14: sum(v[i & 16 : (i & 16) + 16]),
                15: 1,
                16: 1 << i,
                17: (1 << i) - 1,
                18: (2 << i) - 1,
                19: M32 - ((2 << i) - 1),
                20: M32 - ((1 << i) - 1),
            }
            if i in odd:
                expected |= {8: sum(1 << j for j in odd), 9: v[odd[0]]}
            for column, value in expected.items():
                assert out[32 * warp + i, column] == value & M32, (column, i)


def test_halves(ptx: str) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 60, 2)).astype(np.float16)
    out, floats = np.zeros((60, 5, 2), np.float16), np.zeros(60, np.float32)
    launch(ptx, "halves", 1, 64, [constant(a), constant(b), out, floats, 60])
    x, y = a.astype(float), b.astype(float)
    for i, exact in enumerate((x + y, x * y, x * y + x, np.minimum(x, y), x / y)):
        assert np.array_equal(out[:, i], exact.astype(np.float16)), i
    assert np.array_equal(floats, a[:, 0].astype(np.float32) + (a[:, 0] < b[:, 0]))


@pytest.mark.parametrize("atom_reverse", [False, True])
def test_atomics(ptx: str, atom_reverse: bool) -> None:
    longs, single, pair = np.zeros(2, np.uint64), np.zeros(1, np.float32), np.zeros(2, bfloat16)
    extremes, double, ring = np.array([0, 1000, 0], np.int32), np.zeros(1), np.array([0, 0, 5], np.uint32)
    args = [longs, single, pair, extremes, double, ring]
    result = launch(ptx, "atomics", 3, 50, args, atom_reverse=atom_reverse)
    t = np.arange(150)
    assert longs.tolist() == [t.sum(), 3 * 150]
    assert single[0] == 0.5 * t.sum()
    assert double[0] == 0.25 * t.sum()
    assert pair.tolist() == [150, 300]
    assert extremes[:2].tolist() == [(t * 37 % 101).max(), (t * 37 % 101).min()]
    assert 0 <= extremes[2] < 150
    assert ring.tolist() == [150 % 7, M32, (5 - 150) % 10]
    assert result.traffic["arg3"].atomics == 3 * 150


def test_variables_outlive_a_launch(ptx: str) -> None:
    out, gpu = np.zeros(3, np.float32), Gpu()
    launch(ptx, "variables", 1, 1, [out], dev=gpu)
    launch(ptx, "variables", 1, 1, [out], dev=gpu)
    assert out.tolist() == [5, 9, 5]
    launch(ptx, "variables", 1, 1, [out], symbols={"counter": np.uint32(41)})
    assert out[1] == 42
