"""Tensor-core instructions: fragments by the ISA's tables, ldmatrix, stmatrix, wmma; and cache hints."""

from __future__ import annotations

import numpy as np
import pytest

from . import PTXError, launch
from .kernel_sources import bfloat16, compile_kernels, constant


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_mma_fragments(arch: str) -> None:
    """Integer-valued, so that a wrong place of one element shows exactly; the kernel loads fragments by hand."""
    rng = np.random.default_rng(0)
    a16, b16 = (rng.integers(-9, 10, shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    a8, b8 = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, 32), (8, 32)))
    a32, b32 = (rng.integers(-99, 100, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    c32, c16 = np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float16)
    c_integer, c_tf32 = np.zeros((16, 8), np.int32), np.zeros((16, 8), np.float32)
    args = [
        constant(a16),
        constant(b16),
        c32,
        c16,
        constant(a8),
        constant(b8),
        c_integer,
        constant(a32),
        constant(b32),
        c_tf32,
    ]
    result = launch(compile_kernels("mma", arch), "fragments", 1, 32, args)
    assert np.array_equal(c32, a16.astype(np.float32) @ b16.astype(np.float32).T)
    assert np.array_equal(c16, (a16.astype(np.float32) @ b16.astype(np.float32).T).astype(np.float16))
    assert np.array_equal(c_integer, a8.astype(int) @ b8.astype(int).T)
    assert np.array_equal(c_tf32, a32 @ b32.T)
    assert result.statistics.warp_mma == 4


def test_tf32_and_f16_round_as_they_should() -> None:
    rng = np.random.default_rng(1)
    a16, b16 = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((8, 16)).astype(np.float16)
    a32, b32 = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    zeros = [np.zeros((16, 8), dtype) for dtype in (np.float32, np.float16, np.int32, np.float32)]
    a8, b8 = np.zeros((16, 32), np.int8), np.zeros((8, 32), np.int8)
    launch(
        compile_kernels("mma", "sm_90"),
        "fragments",
        1,
        32,
        [a16, b16, *zeros[:2], a8, b8, zeros[2], a32, b32, zeros[3]],
    )
    exact = a16.astype(float) @ b16.astype(float).T
    assert np.array_equal(zeros[0], exact.astype(np.float32))
    assert np.array_equal(zeros[1], exact.astype(np.float16))
    a_tf32, b_tf32 = (((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32).astype(float) for x in (a32, b32))
    assert np.array_equal(zeros[3], (a_tf32 @ b_tf32.T).astype(np.float32))


def test_ldmatrix_transposed() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(-9, 10, (16, 16)).astype(bfloat16), rng.integers(-9, 10, (16, 8)).astype(bfloat16)
    c = np.zeros((16, 8), np.float32)
    launch(compile_kernels("gemm"), "transposed", 1, 32, [constant(a), constant(b), c])
    assert np.array_equal(c, a.astype(np.float32) @ b.astype(np.float32))


@pytest.mark.parametrize("transpose", [False, True])
def test_stmatrix(transpose: bool) -> None:
    out = np.zeros((4, 8, 8), np.uint16)
    launch(compile_kernels("mma", "sm_90"), f"store_matrices<{str(transpose).lower()}>", 1, 32, [out])
    numbers = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    assert np.array_equal(out, numbers.transpose(0, 2, 1) if transpose else numbers)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_wmma(arch: str) -> None:
    rng, ptx = np.random.default_rng(3), compile_kernels("wmma", arch)
    a, b = rng.standard_normal((16, 96)).astype(bfloat16), rng.standard_normal((64, 96)).astype(bfloat16)
    c = np.zeros((16, 64), np.float32)
    result = launch(ptx, "tiles", 4, 32, [constant(a), constant(b), c, 64, 96])
    assert np.abs(c - 2 * (a.astype(float) @ b.astype(float).T)).max() < 1.2e-5
    assert result.statistics.warp_mma == 24
    a, b = rng.integers(-9, 10, (2, 16, 16)).astype(np.float16)
    c = np.zeros((16, 16), np.float16)
    launch(ptx, "halves", 1, 32, [constant(a), constant(b), c])
    assert np.array_equal(c, a @ b)


def test_partial_warp_cannot_multiply() -> None:
    c = np.zeros((16, 16), np.float16)
    with pytest.raises(PTXError, match="warp not full"):
        launch(compile_kernels("wmma"), "halves", 1, 16, [c, c, c])


def test_hinted_accesses() -> None:
    """Cache hints and policies change nothing; elect, lop3, cvt.pack and red do what they say."""
    rng = np.random.default_rng(4)
    p, o = rng.integers(0, 2**32, (32, 4), dtype=np.uint32), np.zeros((32, 4), np.uint32)
    q, fx = np.zeros(65, np.int32), np.linspace(-200, 200, 32).astype(np.float32)
    result = launch(compile_kernels("inline_ptx", "sm_90"), "hints", 1, 32, [constant(p), o, q, constant(fx)])
    doubled = p[:, 0] + p[:, 0]
    assert np.array_equal(o[:, 0], doubled)
    assert np.array_equal(o[:, 1], (doubled & p[:, 1]) | np.uint32(0x0F0F0F0F))
    assert np.array_equal(o[:, 2] - p[:, 2], np.arange(32) == 0)
    packed = (np.clip(fx.astype(int), -128, 127) & 255) << 8 | 0x80 | 0x12340000
    assert np.array_equal(o[:, 3], packed)
    assert q[:32].tolist() == [1] * 32
    assert q[64] == sum(range(32))
    assert not result.errors


def test_ldmatrix_is_over_before_the_warp_goes_on() -> None:
    out = np.zeros(32, np.uint32)
    assert not launch(compile_kernels("mma", "sm_90"), "written_after_ldmatrix", 1, 32, [out]).findings
    assert (out == (1 + 2) * 0x10001).all()
