"""How the ops run on a GPU: stream, device, graphs, memory, no waiting. What they compute: test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import normal, quantized_normal
from lora_cases import adapters
from on_device import cpu, on
from reference import Quantized, assert_same
from torch import Tensor

pytestmark = pytest.mark.needs_cuda

DEVICE = "cuda"
MIB = 2**20
N, K = 512, 1024
ROWS = (1, 16, 300)  # fused; fused, with several rows; by slices
ops = torch.ops.qlora_ext


@pytest.fixture(autouse=True)
def sums_in_fp32() -> Iterator[None]:
    """Of cuBLAS as well, which by default may add parts of a product up in bf16."""
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    yield
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


def x_and_weight() -> tuple[Tensor, Quantized]:
    return normal(max(ROWS), K, dtype=torch.bfloat16), quantized_normal((N, K), "nf4", 64, double_quant=True)


def linear_4bit(m: int, x: Tensor, q: Quantized) -> Tensor:
    y: Tensor = ops.linear_4bit(x[:m], *q, N, None)
    return y


def linear_4bit_dgrad(m: int, x: Tensor, q: Quantized) -> Tensor:
    grad_x: Tensor = ops.linear_4bit_dgrad(x[:m, :N], *q, K)
    return grad_x


def lora_linear_4bit(m: int, x: Tensor, q: Quantized) -> tuple[Tensor, Tensor]:
    """A is made of the weight's scales, B of x, the seed of codes: they, too, are there only when the inputs are."""
    a, b = (q.absmax.view(-1, K)[:8].float() / 256 - 0.5) / 16, x[:1, :N].T.float().repeat(1, 8)
    dropout = [0.9], q.packed[0, :8].view(torch.int64)
    result: tuple[Tensor, Tensor] = ops.lora_linear_4bit(x[:m], *q, N, None, [a], [b], [0.1], *dropout)
    return result


# Each op of (x [300, K], weight [N, K]); the products with each number of rows.
CALLS: dict[str, Callable[[Tensor, Quantized], Any]] = {
    "quantize_4bit": lambda x, _: ops.quantize_4bit(x, "nf4", 64),
    "quantize_absmax": lambda x, _: ops.quantize_absmax(x.float()),
    "dequantize_4bit": lambda _, q: ops.dequantize_4bit(*q, (N, K), torch.bfloat16),
    "dropout_mask": lambda x, q: ops.dropout_mask(x, 0.9, q.packed[0, :8].view(torch.int64)),
} | {f"{op.__name__}-M{m}": partial(op, m) for op in (linear_4bit, linear_4bit_dgrad, lora_linear_4bit) for m in ROWS}
ON_EACH = pytest.mark.parametrize("name", CALLS)


def assert_equal_calls(name: str, got: object, expected: object) -> None:
    """Bit for bit, but where cuBLAS has a part, which may choose another kernel in a graph or on another stream."""
    if "lora" in name or name.endswith("M300"):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    else:
        assert_same(got, expected)


@ON_EACH
def test_gives_what_the_cpu_gives(name: str) -> None:
    """Small enough for compute-sanitizer, which runs those cases of this test that leave out cuBLAS."""
    x, q = x_and_weight()
    torch.testing.assert_close(cpu(CALLS[name](*on(DEVICE, (x, q)))), CALLS[name](x, q), rtol=0.02, atol=0.02)


@ON_EACH
def test_runs_on_the_current_stream(name: str) -> None:
    """The inputs are there only when the stream has slept: a kernel on another stream would read zeros."""
    x, q = on(DEVICE, x_and_weight())
    expected = CALLS[name](x, q)
    late_x, late_q = torch.zeros_like(x), Quantized(*(torch.zeros_like(t) for t in q[:4]), *q[4:])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        late_x.copy_(x)
        for target, source in zip(late_q[:4], q[:4], strict=True):
            target.copy_(source)
        results = CALLS[name](late_x, late_q)
    stream.synchronize()
    assert_equal_calls(name, results, expected)


@ON_EACH
def test_never_waits_for_the_device(name: str) -> None:
    x, q = on(DEVICE, x_and_weight())
    CALLS[name](x, q)  # what is set up only once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](x, q)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_EACH
def test_replays_as_a_cuda_graph(name: str) -> None:
    """On other values in the same tensors, twice: what a kernel counts must start anew in each replay."""
    x, q = on(DEVICE, x_and_weight())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CALLS[name](x, q)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = CALLS[name](x, q)
    for seed in (5, 6):
        x.copy_(normal(*x.shape, seed=seed))
        q.packed.random_(0, 256)
        graph.replay()
        assert_equal_calls(name, results, CALLS[name](x, q))


@ON_EACH
def test_runs_on_the_device_of_its_tensors(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, q = x_and_weight()
    results = CALLS[name](*on("cuda:1", (x, q)))
    assert {t.device.index for t in ([results] if isinstance(results, Tensor) else results)} == {1}
    assert_equal_calls(name, cpu(results), cpu(CALLS[name](*on("cuda:0", (x, q)))))


@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_products_are_the_same_in_every_run(m: int) -> None:
    """Sums split over thread blocks are added in a fixed order, whichever block arrives last."""
    q = on(DEVICE, quantized_normal((512, 4096), "nf4", 64, double_quant=True))
    x, grad = normal(m, 4096).to(DEVICE, torch.bfloat16), normal(m, 512).to(DEVICE, torch.bfloat16)
    expected = ops.linear_4bit(x, *q, 512, None), ops.linear_4bit_dgrad(grad, *q, 4096)
    for _ in range(20):
        assert_same((ops.linear_4bit(x, *q, 512, None), ops.linear_4bit_dgrad(grad, *q, 4096)), expected)


@pytest.mark.parametrize("dgrad", [False, True], ids=["linear_4bit", "linear_4bit_dgrad"])
@pytest.mark.parametrize("m", [1, 16, 64, 2048])
def test_no_allocation_of_weight_size(m: int, dgrad: bool) -> None:
    """The dense weight would be 128 MiB. Few rows need partial sums only, many rows a slice of at most 32 MiB."""
    size = 8192
    packed = torch.randint(256, (size, size // 2), dtype=torch.uint8, device=DEVICE)
    q = (packed, *ops.quantize_absmax(torch.rand(size, size // 64, device=DEVICE)), "nf4", 64)
    x = torch.randn(m, size, device=DEVICE, dtype=torch.bfloat16)
    op = ops.linear_4bit_dgrad if dgrad else partial(ops.linear_4bit, bias=None)
    last = {"in_features": size} if dgrad else {"out_features": size}
    extra = bytes_beside_result(partial(op, x, *q, **last))
    if m > 64:  # torch's product of a slice: since 2.15 cuBLAS has a workspace for each product, of 32 MiB on an H100
        extra -= bytes_beside_result(partial(torch.mm, x, torch.randn(size, 2048, device=DEVICE, dtype=x.dtype)))
    assert extra <= (4 if m == 1 else 34) * MIB, f"{extra / MIB:.1f} MiB beside the result"


def bytes_beside_result(product: Callable[[], Tensor]) -> int:
    """The most that its second call allocates: what is kept from the first on does not count."""
    product()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = product()
    return torch.cuda.max_memory_allocated() - before - y.numel() * y.element_size()


@pytest.mark.parametrize("stays", ["x", "packed", "absmax", "nested_absmax", "nested_offset", "bias"])
def test_tensors_on_two_devices_are_an_error(stays: str) -> None:
    x, q = x_and_weight()
    tensors = {"x": x[:2], "bias": normal(N)} | dict(zip(Quantized._fields[:4], q[:4], strict=True))
    there = {name: tensor if name == stays else tensor.to(DEVICE) for name, tensor in tensors.items()}
    bias, x = there.pop("bias"), there.pop("x")
    weight = there | {"quant_type": "nf4", "blocksize": 64}
    with pytest.raises(ValueError, match=r"^linear_4bit: \w+: expected device (cuda:0|cpu), got (cuda:0|cpu)"):
        ops.linear_4bit(x, **weight, out_features=N, bias=bias)
    if stays == "bias":
        return
    with pytest.raises(ValueError, match=r"^linear_4bit_dgrad: \w+: expected device (cuda:0|cpu), got (cuda:0|cpu)"):
        ops.linear_4bit_dgrad(x[:, :N], **weight, in_features=K)
    if stays != "x":
        with pytest.raises(ValueError, match=r"^dequantize_4bit: \w+: expected device (cuda:0|cpu), got (cuda:0|cpu)"):
            ops.dequantize_4bit(**weight, shape=(N, K), dtype=torch.bfloat16)


def test_opcheck() -> None:
    x, q = on(DEVICE, x_and_weight())
    torch.library.opcheck(ops.quantize_4bit.default, (x, "nf4", 64))
    torch.library.opcheck(ops.quantize_absmax.default, (x.float(),))
    torch.library.opcheck(ops.dequantize_4bit.default, (*q, (N, K), torch.bfloat16))
    torch.library.opcheck(ops.linear_4bit_dgrad.default, (x[:2, :N], *q, K))
    torch.library.opcheck(ops.dropout_mask.default, (x, 0.9, torch.tensor(7, device=DEVICE)))
    for m in (2, 300):
        torch.library.opcheck(ops.linear_4bit.default, (x[:m].clone().requires_grad_(), *q, N, None))
    a, b, scaling = on(DEVICE, adapters((8,), N, K))
    for dropout in (([], None), ([0.5], torch.tensor([7], device=DEVICE))):
        torch.library.opcheck(ops.lora_linear_4bit.default, (x[:2], *q, N, None, a, b, scaling, *dropout))
