"""Whole kernels of the kinds that the project has, against numpy: exact wherever the arithmetic is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from . import Gpu, find_kernel, kernels, launch, launch_all_schedules, unsupported
from .kernel_sources import bfloat16, compile_kernels, constant, exact_bf16

TABLE = np.sort(np.random.default_rng(9).standard_normal(16)).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    "name",
    [
        "vector_add",
        "quantize",
        "dequantize",
        "gemm",
        "reduce",
        "adamw",
        "language",
        "mma",
        "wmma",
        "inline_ptx",
        "barriers",
    ],
)
def test_every_instruction_is_known(name: str) -> None:
    ptx = compile_kernels(name, arch="sm_90")
    for kernel in kernels(ptx):
        assert unsupported(ptx, kernel) == []


def test_vector_add(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((2, 5000)).astype(np.float32)
    out = np.full(5000, np.nan, np.float32)
    result = launch(compile_kernels("vector_add"), "vecadd", 7, 96, [constant(a), constant(b), out, 5000, 1.5])
    assert np.array_equal(out, (np.float32(1.5) * a.astype(np.float64) + b).astype(np.float32))
    assert not result.findings
    assert result.statistics.threads == 672


@pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["float", "bf16"])
def test_quantize(rng: np.random.Generator, dtype: type) -> None:
    blocks = 37
    x = rng.standard_normal(blocks * 64).astype(np.float32).astype(dtype)
    packed, absmax = np.zeros(blocks * 32, np.uint8), np.zeros(blocks, np.float32)
    name = "quantize<float>" if dtype is np.float32 else "quantize<__nv_bfloat16>"
    launch(compile_kernels("quantize"), name, 10, 128, [constant(x), packed, absmax, blocks], symbols={"table": TABLE})
    rows = x.astype(np.float32).reshape(blocks, 64)
    expected = np.abs(rows).max(axis=1)
    scaled = rows * (np.float32(1) / expected)[:, None]
    codes = np.abs(scaled[..., None] - TABLE).argmin(axis=-1).astype(np.uint8)
    assert np.array_equal(absmax, expected)
    assert np.array_equal(packed, (codes[:, 0::2] << 4 | codes[:, 1::2]).ravel())


def test_block_reduction(rng: np.random.Generator) -> None:
    x = rng.standard_normal(1000).astype(np.float32)
    out, packed = np.zeros(4, np.float32), np.zeros(256, np.uint32)
    args = [constant(x), out, packed, 1000]
    launch_all_schedules(compile_kernels("quantize"), "block_absmax", 4, 256, lambda: args, [1, 2])
    padded = np.pad(x, (0, 24)).reshape(4, 256)
    absmax = np.abs(padded).max(axis=1)
    codes = np.rint((padded / absmax[:, None]) * np.float32(127)).astype(np.int32).astype(np.uint8)
    assert np.array_equal(out, absmax)
    assert np.array_equal(packed.view(np.uint8), codes.ravel())


def test_dequantize(rng: np.random.Generator) -> None:
    count = 50 * 32
    packed = rng.integers(0, 256, count // 2, dtype=np.uint8)
    absmax, out = rng.random(count // 64).astype(np.float32), np.zeros(count, bfloat16)
    args = [constant(packed), constant(absmax), constant(TABLE), out, count // 32]
    result = launch(compile_kernels("dequantize"), "dequantize", 2, 64, args)
    values = TABLE.astype(bfloat16)[np.stack([packed >> 4, packed & 15], -1).ravel()].astype(np.float32)
    scales = np.repeat(absmax.astype(bfloat16), 64).astype(np.float32)
    assert np.array_equal(out.view(np.uint16), (values * scales).astype(bfloat16).view(np.uint16))
    assert (result.traffic["arg0"].read.times == 1).all()


def test_bf16_operations(rng: np.random.Generator) -> None:
    a, b = ((rng.standard_normal((300, 2)) * 10.0 ** rng.integers(-5, 5, (300, 2))).astype(bfloat16) for _ in range(2))
    out = np.zeros((300, 6, 2), bfloat16)
    launch(compile_kernels("dequantize"), "bf16_operations", 3, 128, [constant(a), constant(b), out, 300])
    x, y = a.astype(np.float64), b.astype(np.float64)
    for i, exact in enumerate((x + y, x * y, x * y + x, x - y, np.fmax(x, y))):
        assert np.array_equal(out[:, i].view(np.uint16), exact_bf16(exact).view(np.uint16)), i
    assert np.array_equal(out[:, 5].view(np.uint16), np.stack([a[:, 0], b[:, 0]], -1).view(np.uint16))


@pytest.mark.parametrize(("m", "n", "k"), [(16, 64, 128), (5, 40, 64), (33, 32, 96)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_gemm(rng: np.random.Generator, m: int, n: int, k: int, arch: str) -> None:
    a, b = rng.standard_normal((m, k)).astype(bfloat16), rng.standard_normal((n, k)).astype(bfloat16)
    c, c32 = np.zeros((m, n), bfloat16), np.zeros((m, n), np.float32)
    grid, args = ((n + 31) // 32, (m + 15) // 16), [constant(a), constant(b), c, c32, m, n, k]
    ptx = compile_kernels("gemm", arch, ("-lineinfo",))  # debug data is full of what looks like statements
    results = launch_all_schedules(ptx, "gemm16", grid, 128, lambda: args, [2, 3])
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    assert np.abs(c32 - exact).max() <= 4e-6
    assert np.array_equal(c.view(np.uint16), c32.astype(bfloat16).view(np.uint16))
    assert results[0].statistics.warp_mma == grid[0] * grid[1] * 4 * (k // 16)


def test_gemm_of_integers_is_exact(rng: np.random.Generator) -> None:
    a, b = (rng.integers(-2, 3, (rows, 64)).astype(bfloat16) for rows in (16, 32))
    c, c32 = np.zeros((16, 32), bfloat16), np.zeros((16, 32), np.float32)
    launch(compile_kernels("gemm"), "gemm16", 1, 128, [constant(a), constant(b), c, c32, 16, 32, 64])
    assert np.array_equal(c32, a.astype(np.float32) @ b.astype(np.float32).T)


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "warp"}, {"block_order": "reverse"}, {"schedule": "warp_rev", "block_order": "random"}],
    ids=str,
)
def test_last_block_reduces(rng: np.random.Generator, options: dict[str, str]) -> None:
    x = rng.integers(-8, 9, 3000).astype(np.float32)  # sums of integers are exact in any order
    partial, out = np.zeros(6, np.float32), np.zeros(1, np.float32)
    ticket, total = np.zeros(1, np.uint32), np.zeros(1, np.float32)
    args = [constant(x), partial, out, ticket, total, 3000]
    result = launch(compile_kernels("reduce"), "reduce_last", 6, 128, args, dynamic_smem=512, **options)
    assert out[0] == total[0] == x.sum()
    assert ticket[0] == 0
    assert result.categories == {"global-read-of-other-blocks-write"}


def test_struct_of_pointers_by_value(rng: np.random.Generator) -> None:
    """The multi-tensor form: tables of pointers in a struct of 1288 bytes."""
    sizes, chunk, gpu = [100, 257, 64], 128, Gpu()
    fields = [(name, kind, 24) for name, kind in (("p", "u8"), ("g", "u8"), ("m", "u8"), ("v", "u8"), ("n", "i8"))]
    table = np.zeros((), np.dtype([*fields, ("count", "i4"), ("tensor", "u1", 64), ("chunk", "i4", 64)], align=True))
    ptx, tensors, blocks = compile_kernels("adamw"), [], 0
    parameters = find_kernel(ptx, "adamw").parameters
    layout = [(parameter.type, parameter.size, parameter.offset) for parameter in parameters]
    assert layout[0] == ("b8", 1288, 0) == ("b8", table.dtype.itemsize, 0)
    assert layout[1:3] == [("f32", 4, 1288), ("f32", 4, 1292)]
    assert layout[-2:] == [("u32", 4, 1316), ("u64", 8, 1320)]
    for i, size in enumerate(sizes):
        host = [
            rng.standard_normal(size),
            rng.standard_normal(size),
            rng.standard_normal(size) * 0.1,
            rng.random(size) * 0.1,
        ]
        host = [array.astype(bfloat16 if name == "g" else np.float32) for name, array in zip("pgmv", host, strict=True)]
        device = [
            gpu.array(array, f"{name}{i}", readonly=name == "g") for name, array in zip("pgmv", host, strict=True)
        ]
        tensors.append((host, device))
        for name, array in zip("pgmv", device, strict=True):
            table[name][i] = array.address
        table["n"][i] = size
        for c in range(-(-size // chunk)):
            table["tensor"][blocks], table["chunk"][blocks] = i, c
            blocks += 1
    norm, (lr, b1, b2, eps, wd, bc1, bc2) = np.array([2.3], np.float32), (1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.001)
    launch(ptx, "adamw", blocks, 64, [table[()], lr, b1, b2, eps, wd, bc1, bc2, chunk, constant(norm)], dev=gpu)
    lr, b1, b2, eps, wd, bc1, bc2 = (float(np.float32(x)) for x in (lr, b1, b2, eps, wd, bc1, bc2))  # as it gets them
    for host, device in tensors:
        p, g, m, v = (array.astype(np.float64) for array in host)
        g = g / np.sqrt(np.float64(norm[0]) + 1)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p * (1 - lr * wd) - lr * (m / bc1) / (np.sqrt(v / bc2) + eps)
        assert np.abs(device[0].get() - p).max() < 2.4e-7  # an ulp of p
        assert np.abs(device[2].get() - m).max() < 6e-8
        assert np.abs(device[3].get() - v).max() < 4e-8


@pytest.mark.parametrize("fast_math", [False, True])
def test_math_functions(rng: np.random.Generator, fast_math: bool) -> None:
    x = (rng.standard_normal(500) * 2).astype(np.float32)
    out = np.zeros((500, 12), np.float32)
    ptx = compile_kernels("adamw", flags=("-use_fast_math",) if fast_math else ())
    launch(ptx, "mathfn", 4, 128, [constant(x), out, 500])
    d = x.astype(np.float64)
    a, above_zero = np.abs(d), (np.abs(x) + np.float32(1e-3)).astype(np.float64)
    exact = [
        *(
            np.exp(d),
            np.log(above_zero),
            np.tanh(d),
            (a + 0.1) ** 1.7,
            1 / np.sqrt(a + 1e-6),
            np.exp(d),
            d / (1 + np.exp(-d)),
        ),
        *(np.array([math.erf(v) for v in d]), np.sin((x * np.float32(50)).astype(np.float64))),
        *(np.fmod(d, np.float64(np.float32(0.7))), d * 3 / 7, d / 3 + np.rint(d) + np.floor(d) + np.sign(d)),
    ]
    for i, expected in enumerate(exact):
        relative = np.abs(out[:, i] - expected) / np.maximum(np.abs(expected), 1e-6)
        assert relative.max() < 6e-7, i
    assert np.array_equal(out[:, 9], exact[9])  # fmod is exact
