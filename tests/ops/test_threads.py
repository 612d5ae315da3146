"""Results depend neither on the run nor on the number of threads, and two threads really share the work."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import DTYPES, normal, quantized_normal
from reference import assert_same, quantize
from torch import Tensor
from torch.nn import Parameter

from qlora_ext import PagedAdamW

ops = torch.ops.qlora_ext
M, N, K = 128, 384, 2048  # enough for several threads in every op
Q = quantized_normal((N, K), "nf4", 64, double_quant=True)
FLAT_K = 2000  # no multiple of the blocksize
FLAT_Q = quantized_normal((N, FLAT_K), "nf4", 64, double_quant=True)
WEIGHT, X, GRAD = normal(N, K), normal(M, K), normal(M, N)
ABSMAX = WEIGHT.abs()
A, B = [normal(8, K)], [normal(N, 8)]
XA, DROPOUT = normal(M, 8), ([0.9], torch.tensor([7]))
ENDS = torch.tensor([1, 1, 40, M])  # of the rows of 4 experts

# Each op in a dtype, and the products with a number of rows.
CALLS: dict[str, Callable[[torch.dtype], Tensor | tuple[Tensor, ...]]] = {
    "quantize_4bit": lambda dtype: ops.quantize_4bit(WEIGHT.to(dtype), "nf4", 64),
    "quantize_absmax": lambda _: ops.quantize_absmax(ABSMAX),
    "dequantize_4bit": lambda dtype: ops.dequantize_4bit(*Q, (N, K), dtype),
}
for m in (1, 4, M):
    CALLS |= {
        f"linear_4bit-M{m}": lambda dtype, m=m: ops.linear_4bit(X[:m].to(dtype), *Q, N, None),
        f"linear_4bit-flat-M{m}": lambda dtype, m=m: ops.linear_4bit(X[:m, :FLAT_K].to(dtype), *FLAT_Q, N, None),
        f"linear_4bit_dgrad-M{m}": lambda dtype, m=m: ops.linear_4bit_dgrad(GRAD[:m].to(dtype), *Q, K),
        f"lora_linear_4bit-M{m}": lambda dtype, m=m: ops.lora_linear_4bit(
            X[:m].to(dtype), *Q, N, None, A, B, [0.5], [], None
        ),
    }
CALLS["lora_linear_4bit-dropout"] = lambda dtype: ops.lora_linear_4bit(X.to(dtype), *Q, N, None, A, B, [0.5], *DROPOUT)
CALLS["lora_experts_4bit"] = lambda dtype: ops.lora_experts_4bit(
    X.to(dtype), *Q, ENDS, N // 4, False, [A[0].expand(4, 8, K)], [B[0].view(4, N // 4, 8)], [0.5]
)
CALLS["lora_experts_4bit_backward"] = lambda dtype: ops.lora_experts_4bit_backward(
    GRAD[:, : N // 4].to(dtype), X.to(dtype), XA.to(dtype), *Q, ENDS, False,
    [A[0].expand(4, 8, K)], [B[0].view(4, N // 4, 8)], [0.5], True, True, True,
)  # fmt: skip
CALLS["lora_backward"] = lambda dtype: ops.lora_linear_4bit_backward(
    GRAD.to(dtype), X.to(dtype), XA.to(dtype), *Q, A, B, [0.5], *DROPOUT, True, True, True
)


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
    """Of many rows: on x86-64 without AVX2, and of bf16 where the CPU multiplies matrices of it."""
    if platform.machine() != "aarch64" and cpu_path == "portable":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    amx = "amx_bf16" in flags and cpu_path == "avx512_bf16"
    return dtype == torch.bfloat16 and (amx or "bf16" in flags)


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


def ticks_by_thread() -> dict[str, int]:
    """CPU time (user + system) of each native thread of this process so far, in ticks of 10 ms."""
    stats = {task.name: (task / "stat").read_text() for task in Path("/proc/self/task").iterdir()}
    return {thread: sum(map(int, stat.rpartition(")")[2].split()[11:13])) for thread, stat in stats.items()}


def busy_threads(call: Callable[[], object]) -> int:
    """How many threads did at least a tenth of the work of calls that take this one 0.3 s of CPU time.

    A thread that is given nothing counts, too, if it waits, spinning, for one that works less than some milliseconds.
    What is noticed is an op that asks for no other thread.
    """
    call()
    before = ticks_by_thread()
    end = time.thread_time() + 0.3  # of the clock's time other processes may have most
    while time.thread_time() < end:
        call()
    spent = [ticks - before.get(thread, 0) for thread, ticks in ticks_by_thread().items()]
    return sum(ticks > 0.1 * sum(spent) for ticks in spent)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by Linux's /proc")
@pytest.mark.parametrize(
    "op", ["quantize_4bit", "quantize_absmax", "dequantize_4bit", "linear_4bit-M1", "linear_4bit-M128", "lora_backward"]
)
def test_as_many_threads_work_as_torch_is_told(op: str) -> None:
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        assert busy_threads(partial(CALLS[op], torch.float32)) == num_threads
