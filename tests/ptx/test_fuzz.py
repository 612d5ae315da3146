"""The same random C functions through nvcc's PTX and through the host compiler: every bit must agree."""

from __future__ import annotations

import ctypes
import os
import subprocess

import numpy as np
import pytest

from . import compile_cu, launch, unsupported
from .compile import CACHE, write_source
from .fuzz import source
from .kernel_sources import constant

FUNCTIONS = 60
THREADS = 256
IN = np.dtype(
    [
        *((name, "i4") for name in "ab"),
        ("c", "u4"),
        ("d", "u2"),
        ("x", "i8"),
        ("y", "u8"),
        *((n, "f4") for n in "fgh"),
        ("pad", "f4"),
    ],
    align=True,
)
HOST_COMPILER = ["g++", "-w", "-shared", "-O1", "-fPIC", "-ffp-contract=off", "-fwrapv", "-x", "c++", "-o"]


def inputs(seed: int) -> np.ndarray:
    """Numbers of all lengths; floats of all sizes and every special value."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(THREADS, IN)
    for name in "abcdxy":
        words = rng.integers(0, 2**64, THREADS, dtype=np.uint64) >> rng.integers(0, 64, THREADS).astype(np.uint64)
        negative = rng.choice([1, -1] if IN[name].kind == "i" else [1], THREADS).astype(IN[name])
        rows[name] = words.astype(f"u{IN[name].itemsize}").view(IN[name]) * negative
    special = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-40, 3e38, 0.5], np.float32)
    for name in "fgh":
        ordinary = (rng.standard_normal(THREADS) * 10.0 ** rng.integers(-12, 12, THREADS)).astype(np.float32)
        rows[name] = np.where(rng.random(THREADS) < 0.15, rng.choice(special, THREADS), ordinary)
    return constant(rows)


@pytest.mark.parametrize("seed", [1, 3])
def test_functions_agree_with_the_host(seed: int) -> None:
    path = write_source(source(seed, FUNCTIONS), f"fuzz_{seed}")
    ptx = compile_cu(path, flags=("-fmad=false", "-w"))
    library = CACHE / f"fuzz_{seed}.so"
    if not library.exists() or library.stat().st_mtime < path.stat().st_mtime:
        draft = library.with_suffix(f".{os.getpid()}.so")
        subprocess.run([*HOST_COMPILER, draft, path], check=True)
        os.replace(draft, library)
    host = ctypes.CDLL(str(library))
    rows, different = inputs(seed), []
    for i in range(FUNCTIONS):
        assert unsupported(ptx, f"dev{i}") == []
        expected, out = np.zeros((2, THREADS, 2), np.uint64)
        host[f"host{i}"](rows.ctypes.data_as(ctypes.c_void_p), expected.ctypes.data_as(ctypes.c_void_p), THREADS)
        launch(ptx, f"dev{i}", 4, THREADS // 4, [rows, out, THREADS])
        for thread in np.flatnonzero((expected != out).any(axis=1))[:1]:
            different.append((i, rows[thread], expected[thread], out[thread]))
    assert not different
