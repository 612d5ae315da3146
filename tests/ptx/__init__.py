"""Runs what `nvcc -ptx` made of a CUDA file on the CPU, and checks every access: a functional model of a GPU without
a GPU.

    ptx = compile_cu("my.cu", arch="sm_80", flags=("-Iinclude",))
    out = np.full(n, np.nan, np.float32)
    result = launch(ptx, "my_kernel", grid=(8, 2), block=256, args=[x, out, n, 1.5], dynamic_smem=4096)
    result.traffic["arg0"].read.sectors

A launch raises PTXError on what is wrong for certain (see report.ERRORS). The idea of running a whole grid as numpy
arrays, the lowest program counter first, is tinygrad's (test/mockgpu/nv/emu.py).

It runs PTX, not machine code: registers, spills, occupancy, timing and caches are not modelled, nor is the reordering
of the memory model, but for one rule: what a block reads of another one's plain stores must have a fence behind it.
mma, .approx functions and the order of float atomics do not have the hardware's bits. Not known, and an error when
reached: mbarrier, cp.async.bulk, wgmma, tcgen05, clusters, textures, 128-bit registers, sparse, f64, int4 and fp8 mma,
fp8 conversions, vector red, recursion and calls by pointer.
"""

from .compile import compile_cu, compile_text, find_nvcc, require_nvcc
from .errors import PTXError, UnsupportedError
from .launch import ALL_SCHEDULES, DeviceArray, Gpu, find_kernel, kernels, launch, launch_all_schedules, unsupported
from .report import Finding, Result
from .traffic import Traffic

__all__ = [
    "ALL_SCHEDULES",
    "DeviceArray",
    "Finding",
    "Gpu",
    "PTXError",
    "Result",
    "Traffic",
    "UnsupportedError",
    "compile_cu",
    "compile_text",
    "find_kernel",
    "find_nvcc",
    "kernels",
    "launch",
    "launch_all_schedules",
    "require_nvcc",
    "unsupported",
]
