"""The CUDA files of these tests, and their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from . import compile_cu

KERNELS = Path(__file__).parent / "kernels"
bfloat16 = ml_dtypes.bfloat16


def compile_kernels(name: str, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """The PTX of kernels/<name>.cu."""
    return compile_cu(KERNELS / f"{name}.cu", arch, flags)


def constant(array: np.ndarray) -> np.ndarray:
    """A copy that neither the host nor a kernel may write."""
    copy = np.array(array)
    copy.flags.writeable = False
    return copy


def exact_bf16(values: np.ndarray) -> np.ndarray:
    """float64 to bf16 with one rounding (ml_dtypes rounds twice, through float32): the nearest of the bf16
    neighbours.
    """
    near = values.astype(np.float32).astype(bfloat16).view(np.int16).astype(np.int32)
    candidates = (near[..., None] + np.array([-1, 0, 1])).astype(np.int16).view(bfloat16).astype(np.float64)
    distance = np.abs(candidates - values[..., None])
    even = (candidates.astype(bfloat16).view(np.uint16) & 1).astype(np.float64)
    best = np.lexsort((even, distance), axis=-1)[..., :1]
    return np.take_along_axis(candidates, best, axis=-1)[..., 0].astype(bfloat16)
