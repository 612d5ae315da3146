"""What this machine can do at most: limits.cpp, compiled and run, and the least time that these limits leave an op."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
PROGRAM = Path(__file__).parent.parent / "build" / "limits"
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_BYTES = 2**20  # of a buffer that a bandwidth is measured on
Limits = dict[str, Any]  # bytes/s and flops/s by the names that limits.cpp gives them

# The set whose fp32 figure bounds a path of csrc/cpu.
FMA_OF_PATH = {"portable": "baseline", "avx2": "avx2", "avx512": "avx512", "avx512_bf16": "avx512", "amx": "avx512"}
BF16_OF_PATH = {"avx512_bf16": "dpbf16", "amx": "tdpbf16"}


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core reaches, as the system tells; 32 MB where it does not."""
    sizes = {path.parent: path.read_text().strip() for path in CACHES.glob("index*/size")}
    return max((int(size.rstrip("K")) * 1024 for size in sizes.values()), default=2**25)


def build() -> Path:
    """Compile limits.cpp, unless that is done already."""
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > SOURCE.stat().st_mtime:
        return PROGRAM
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"bench/limits.py: a C++ compiler: expected {compiler} (or the one named in CXX)")
    PROGRAM.parent.mkdir(exist_ok=True)
    beside = PROGRAM.with_suffix(f".{os.getpid()}")  # another bench may be running the program
    subprocess.run([compiler, "-std=c++20", "-O3", "-fopenmp", str(SOURCE), "-o", str(beside)], check=True)
    os.replace(beside, PROGRAM)
    return PROGRAM


def measure(cold_bytes: int, hot_bytes: int, *, seconds: float = 0.1) -> Limits:
    """Run the program on torch's number of threads.

    Args:
        cold_bytes: of the buffer for the bandwidth of memory, 4 times the last-level cache or more.
        hot_bytes: of the one for the bandwidth of the cache.
        seconds: for each figure; the whole takes about 12 times that.
    """
    hot_bytes = max(hot_bytes, LEAST_BYTES)
    arguments = (torch.get_num_threads(), max(cold_bytes, hot_bytes), hot_bytes, seconds)
    done = subprocess.run([str(build()), *map(str, arguments)], capture_output=True, text=True, check=True)
    limits: Limits = json.loads(done.stdout)
    return limits


def flops_per_s(limits: Limits, dtype: torch.dtype, cpu_path: str) -> float:
    """The peak of a product in this dtype on this path: dpbf16 or tdpbf16 where the path has it, else fp32 FMA."""
    if dtype == torch.bfloat16 and cpu_path in BF16_OF_PATH:
        return float(limits[BF16_OF_PATH[cpu_path]])
    return float(limits["fma_fp32"][FMA_OF_PATH[cpu_path]])


def least_seconds(
    measured: list[Limits],
    *,
    moved_bytes: int,
    flops: int,
    copying: bool,
    mode: str,
    dtype: torch.dtype,
    cpu_path: str,
) -> float:
    """No less than this could it take: the bytes at the bandwidth or the flops at the peak, whichever is longer.

    Of several measurements the fastest counts: a share of the limit is never the better for a slow moment.
    """
    bandwidth = ("hot_" if mode == "hot" else "") + ("copy" if copying else "read")
    moving = moved_bytes / max(float(limits[bandwidth]) for limits in measured)
    computing = flops / max(flops_per_s(limits, dtype, cpu_path) for limits in measured)
    return max(moving, computing)
