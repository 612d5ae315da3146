"""Results depend neither on the run nor on the number of threads, and two threads really share the work."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import DTYPES
from reference import assert_same, quantize
from thread_calls import CALLS, WEIGHT, K, N, Q, ops
from torch import Tensor
from torch.nn import Parameter

from qlora_ext import PagedAdamW


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", CALLS)
def test_same_bytes_for_every_thread_count_and_run(op: str, dtype: torch.dtype, cpu_path: str) -> None:
    """Where products are torch's matmul of decoded slices, they may depend on the number of threads by themselves."""
    many_rows = ("linear" in op or "lora" in op) and op not in ("linear_4bit-M1", "linear_4bit-M4")
    sliced = "flat" in op or (many_rows and products_are_torchs(dtype, cpu_path))
    expected: dict[object, Tensor | tuple[Tensor, ...]] = {}
    for num_threads in (1, 2, 3, 1, 2):
        torch.set_num_threads(num_threads)
        result = CALLS[op](dtype)
        assert_same(result, expected.setdefault(num_threads if sliced else "all", result))


def products_are_torchs(dtype: torch.dtype, cpu_path: str) -> bool:
    """Of many rows: on x86-64 without AVX2, and of bf16 where an Arm CPU multiplies matrices of it."""
    if platform.machine() != "aarch64" and cpu_path == "portable":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return dtype == torch.bfloat16 and "bf16" in flags


@pytest.fixture
def flushing() -> Iterator[None]:
    for num_threads in (1, 2):  # with its thread there, which set_flush_denormal does not reach
        torch.set_num_threads(num_threads)
        ops.dequantize_4bit(*Q, (N, K), torch.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


def test_threads_flush_subnormal_numbers_if_the_caller_does(flushing: None) -> None:
    packed, absmax = ops.quantize_4bit(WEIGHT, "nf4", 64)
    tiny = (packed, torch.full_like(absmax, 1e-38), None, None, "nf4", 64)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        p = Parameter(torch.ones(100_000))
        p.grad = torch.full_like(p, 1e-19)  # whose square is subnormal
        PagedAdamW([p], eps=1e-30).step()
        decoded = ops.dequantize_4bit(*tiny, (N, K), torch.float32)
        results.append((p.detach().view(torch.int32), decoded.view(torch.int32)))
    assert_same(*results)


def test_threads_flush_no_longer_than_the_caller(flushing: None) -> None:
    torch.set_num_threads(2)
    ops.quantize_4bit(torch.randn(1 << 20), "nf4", 64)
    torch.set_flush_denormal(False)
    tiny = torch.full((1 << 20,), 1e-40)
    assert (tiny * 1.0 != 0).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_where_subnormal_numbers_are_flushed_zeros_are_zeros_and_fp16_has_its_own(
    quant_type: str, cpu_path: str, flushing: None
) -> None:
    smallest = torch.arange(1, 1024, dtype=torch.int16).view(torch.float16)  # subnormal all, in fp16
    for weight in (torch.zeros(1030), torch.zeros(1030).bfloat16(), torch.cat([smallest, smallest[:7]])):
        torch.set_flush_denormal(False)
        expected = quantize(weight, quant_type)
        torch.set_flush_denormal(True)
        assert_same(ops.quantize_4bit(weight, quant_type, 64), (expected.packed, expected.absmax))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by Linux's /proc")
def test_as_many_threads_work_as_torch_is_told() -> None:
    """In a process of its own, whose threads sleep while they wait: those that spin look like those that work."""
    script = Path(__file__).with_name("busy_threads.py")
    paths = [str(script.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"GOMP_SPINCOUNT": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found
    assert found == {call: [1, 2] for call in found}
