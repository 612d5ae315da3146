from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch._dynamo.compiled_autograd
from cases import DTYPES, normal, pairwise, quantized_normal
from lora_cases import RANKS, SHAPES, adapters, fused, masks, plain, with_gradients
from reference import assert_as_exact_as_torch, assert_same, dequantize_4bit
from torch import Tensor

lora_linear_4bit = torch.ops.qlora_ext.lora_linear_4bit
linear_4bit = torch.ops.qlora_ext.linear_4bit

KEEP = (0.7, 1.0, 0.4)
WEIGHT = quantized_normal((48, 256), "nf4", 64, double_quant=True)
X, A, B, SEED = normal(3, 256), normal(8, 256), normal(48, 8), torch.tensor([7])
DROPOUT = [0.7], SEED


@pytest.mark.parametrize(("dtype_name", "shape", "ranks", "dropout"), pairwise(DTYPES, SHAPES, RANKS, ("", "dropout")))
def test_values_and_gradients_as_exact_as_torch(
    dtype_name: str, shape: str, ranks: str, dropout: str, cpu_path: str
) -> None:
    dtype, (m, n, k) = DTYPES[dtype_name], SHAPES[shape]
    q = quantized_normal((n, k), "nf4", 64, double_quant=True)
    low_weight, weight = dequantize_4bit(q, (n, k), dtype), dequantize_4bit(q, (n, k), torch.float32).double()

    def draw() -> list[tuple[Tensor, ...]]:
        """Ours, torch's and the exact results."""
        a, b, scaling = adapters(RANKS[ranks], n, k)
        leaves = [torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), *a, *b]
        drop = (KEEP[-len(a) :] if len(a) > 1 else KEEP[:1], torch.arange(len(a))) if dropout else ((), None)
        grad = torch.randn(m, n).to(dtype)
        return [
            with_gradients(fused(q, n, scaling, *drop), leaves, grad),
            with_gradients(plain(low_weight, scaling, *drop), leaves, grad),
            with_gradients(plain(weight, scaling, *drop), [leaf.double() for leaf in leaves], grad),
        ]

    # Few rows' xA is few numbers, on which grad B rests, and all does where x is a row and r is 1: of those of one draw
    # torch's largest error may be small by luck.
    draws = [draw() for _ in range(16 if m <= 9 else 1)]
    of_each = list(zip(*(zip(*each, strict=True) for each in draws), strict=True))
    first_grad_B = len(of_each) - len(RANKS[ranks])
    for i, results in enumerate(of_each):
        by_luck = (i == 1 or i >= first_grad_B) and results[0][0].numel() < 128
        by_luck |= m == 1 and RANKS[ranks] == (1,)
        for count in {len(draws)} if by_luck else {1, len(draws)}:
            assert_as_exact_as_torch(*map(torch.stack, zip(*results[:count], strict=True)))


@pytest.mark.parametrize("blocksize", [64, 256], ids=["blocks", "flat"])
@pytest.mark.parametrize("keep", [(), (0.5,)], ids=["", "dropout"])
@pytest.mark.parametrize(("n", "k", "r"), [(300, 64, 300), (96, 320, 5000)])
def test_high_ranks_as_exact_as_torch(
    n: int, k: int, r: int, keep: tuple[float, ...], blocksize: int, cpu_path: str
) -> None:
    q = quantized_normal((n, k), "nf4", blocksize, double_quant=True)
    weight = dequantize_4bit(q, (n, k), torch.float32)
    (a, b, scaling), drop = adapters((r,), n, k), (keep, torch.tensor([1]) if keep else None)
    leaves, grad = [torch.randn(3, k), torch.randn(n), *a, *b], torch.randn(3, n)
    results = with_gradients(fused(q, n, scaling, *drop), leaves, grad)
    torch_results = with_gradients(plain(weight, scaling, *drop), leaves, grad)
    exact = with_gradients(plain(weight.double(), scaling, *drop), [leaf.double() for leaf in leaves], grad)
    for each in zip(results, torch_results, exact, strict=True):
        assert_as_exact_as_torch(*each)


@pytest.mark.parametrize("m", [1, 33])
@pytest.mark.parametrize("k", [256, 300], ids=["blocks", "flat"])
def test_adapters_in_bf16_leave_fp32_exact(k: int, m: int, cpu_path: str) -> None:
    """The type of x decides what is multiplied in, not that of the adapters."""
    q = quantized_normal((48, k), "nf4", 64, double_quant=True)
    a, b, _ = adapters((8,), 48, k)
    a, b, scaling = [t.bfloat16() for t in a], [t.bfloat16() for t in b], [0.3]
    leaves, grad = [torch.randn(m, k), torch.randn(48), *a, *b], torch.randn(m, 48)
    results = with_gradients(fused(q, 48, scaling), leaves, grad)
    weight = dequantize_4bit(q, (48, k), torch.float32)
    in_fp32 = [leaf.float() for leaf in leaves]
    low = with_gradients(plain(weight, scaling), in_fp32, grad)
    exact = with_gradients(plain(weight.double(), scaling), [leaf.double() for leaf in leaves], grad)
    for got, torch_result, exact_result in zip(results, low, exact, strict=True):
        assert_as_exact_as_torch(got, torch_result.to(got.dtype), exact_result)


def test_masked_out_elements_do_not_count(cpu_path: str) -> None:
    """Not even an Inf."""
    a, b, scaling = adapters((8,), 48, 256)
    [mask] = masks(X, *DROPOUT)
    x = torch.where(mask, X, torch.inf)
    _, xa = fused(WEIGHT, 48, scaling, *DROPOUT)(x, None, a, b)
    torch.testing.assert_close(xa, torch.where(mask, x, 0) @ a[0].T)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zero_b_changes_nothing(dtype: torch.dtype, cpu_path: str) -> None:
    """A fresh adapter leaves the model bit for bit as it is."""
    a, b, scaling = adapters((8, 4), 48, 256)
    for m in (1, 4, 100):
        x, bias = torch.randn(m, 256).to(dtype), torch.randn(48).to(dtype)
        y, _ = fused(WEIGHT, 48, scaling)(x, bias, a, [torch.zeros_like(b_i) for b_i in b])
        assert_same(y, linear_4bit(x, *WEIGHT, 48, bias))


def test_gradients_only_where_asked(cpu_path: str) -> None:
    """Each gradient alone has the bytes that it has beside all others; the first layer's x wants none."""
    a, b, scaling = adapters((8, 4), 48, 256)
    leaves = [torch.randn(5, 256), torch.randn(48), *a, *b]
    grad = torch.randn(5, 48)
    forward = fused(WEIGHT, 48, scaling)
    together = with_gradients(forward, leaves, grad)[2:]
    for i, expected in enumerate(together):
        alone = [leaf.clone().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        forward(alone[0], alone[1], alone[2:4], alone[4:6])[0].backward(grad)
        assert_same(alone[i].grad, expected)
        assert all(leaf.grad is None for j, leaf in enumerate(alone) if j != i)


@pytest.mark.parametrize("shape", [(256,), (2, 3, 256), (2, 0, 256)])
def test_leading_dimensions(shape: tuple[int, ...], cpu_path: str) -> None:
    a, b, scaling = adapters((8,), 48, 256)
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 48)
    leaves, forward = [x, torch.randn(48), *a, *b], fused(WEIGHT, 48, scaling, *DROPOUT)
    results = with_gradients(forward, leaves, grad)
    leaves[0] = x.view(-1, 256)
    flat = with_gradients(forward, leaves, grad.view(-1, 48))
    for got, expected in zip(results, flat, strict=True):
        assert_same(got, expected.view(got.shape))


def test_non_contiguous_arguments(cpu_path: str) -> None:
    a, b, scaling = adapters((8,), 48, 256)
    leaves = [torch.randn(7, 256), torch.randn(48), *a, *b]
    grad, inner = torch.randn(7, 48), fused(WEIGHT, 48, scaling, *DROPOUT)
    expected = with_gradients(inner, leaves, grad)

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.T.contiguous().T

    def forward(x: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return inner(transposed(x), bias, [transposed(a_i) for a_i in a], [transposed(b_i) for b_i in b])

    torch.testing.assert_close(with_gradients(forward, leaves, transposed(grad)), expected)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=str)
def test_seeds_in_any_shape(shape: tuple[int, int], cpu_path: str) -> None:
    a, b, scaling = adapters((8, 4), 48, 256)
    seed = torch.arange(2)
    expected = fused(WEIGHT, 48, scaling, [0.5, 0.5], seed)(X, None, a, b)
    assert_same(fused(WEIGHT, 48, scaling, [0.5, 0.5], seed.view(shape))(X, None, a, b), expected)


def test_no_bias(cpu_path: str) -> None:
    a, b, scaling = adapters((8,), 48, 256)
    x = torch.randn(3, 256)
    forward = fused(WEIGHT, 48, scaling)
    assert_same(forward(x, None, a, b), forward(x, torch.zeros(48), a, b))


def test_compile_is_one_graph_forward_and_backward() -> None:
    a, b, scaling = adapters((8, 4), 48, 256)
    leaves = [torch.randn(5, 256), torch.randn(48), *a, *b]
    grad = torch.randn(5, 48)
    forward = fused(WEIGHT, 48, scaling, [0.7, 0.5], torch.arange(2))
    eager = with_gradients(forward, leaves, grad)
    compiled = with_gradients(torch.compile(forward, fullgraph=True), leaves, grad)
    torch.testing.assert_close(compiled, eager)


def call(
    *,
    x: Tensor = X,
    out_features: int = 48,
    bias: Tensor | None = None,
    a: tuple[Tensor, ...] = (A,),
    b: tuple[Tensor, ...] = (B,),
    scaling: tuple[float, ...] = (0.5,),
    keep: tuple[float, ...] = (),
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return lora_linear_4bit(x, *WEIGHT, out_features, bias, a, b, scaling, keep, seed)


BAD = {
    "x-dtype": (partial(call, x=X.double()), TypeError, "x: .*Double"),
    "x-columns": (partial(call, x=X[:, 1:]), ValueError, "packed: .*6120.*6144"),
    "out-features": (partial(call, out_features=47), ValueError, "packed: .*6016.*6144"),
    "bias-dtype": (partial(call, bias=normal(48).double()), TypeError, "bias: "),
    "bias-dimensions": (partial(call, bias=normal(48, 1)), ValueError, "bias: "),
    "bias-size": (partial(call, bias=normal(47)), ValueError, "bias: .*48.*47"),
    "a-none": (partial(call, a=(), b=(), scaling=()), ValueError, "A: .*at least 1"),
    "a-dtype": (partial(call, a=(A.double(),)), TypeError, "A: .*float32"),
    "a-columns": (partial(call, a=(A[:, 1:],)), ValueError, "A: .*255"),
    "a-dimensions": (partial(call, a=(A.view(-1),)), ValueError, "A: "),
    "a-device": (partial(call, a=(A.to("meta"),)), ValueError, "A: .*cpu.*meta"),
    "b-dtype": (partial(call, b=(B.double(),)), TypeError, "B: .*float32"),
    "b-rows": (partial(call, b=(B[1:],)), ValueError, "B: .*47"),
    "b-rank": (partial(call, b=(B[:, 1:],)), ValueError, "B: .*7"),
    "b-device": (partial(call, b=(B.to("meta"),)), ValueError, "B: .*cpu.*meta"),
    "b-length": (partial(call, b=()), ValueError, "B: .*1.*0"),
    "scaling-length": (partial(call, scaling=()), ValueError, "scaling: .*1.*0"),
    "keep-length": (partial(call, keep=(0.5, 0.5), seed=SEED), ValueError, "keep: .*1.*2"),
    "keep-range": (partial(call, keep=(1.5,), seed=SEED), ValueError, r"keep: .*\[0, 1\], got 1.5"),
    "seed-missing": (partial(call, keep=(0.5,)), ValueError, "seed: .*beside keep, got none"),
    "seed-alone": (partial(call, seed=SEED), ValueError, "seed: .*none without keep, got one"),
    "seed-length": (partial(call, keep=(0.5,), seed=torch.arange(2)), ValueError, r"seed: .*1 number, got \[2\]"),
    "seed-dtype": (partial(call, keep=(0.5,), seed=SEED.int()), TypeError, "seed: .*int64.*Int"),
    "seed-device": (partial(call, keep=(0.5,), seed=SEED.to("meta")), ValueError, "seed: .*cpu.*meta"),
}


@pytest.mark.parametrize(("bad_call", "error", "message"), BAD.values(), ids=BAD)
def test_errors(bad_call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^lora_linear_4bit: {message}"):
        bad_call()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dropout", [False, True])
def test_opcheck(dropout: bool, dtype: torch.dtype) -> None:
    a, b, scaling = adapters((8, 4), 24, 128)
    for tensor in (*a, *b):
        tensor.requires_grad_()
    x = torch.randn(2, 5, 128).to(dtype).requires_grad_()
    bias = torch.randn(24).to(dtype).requires_grad_()
    drop = ([0.7, 1.0], torch.arange(2)) if dropout else ([], None)
    q = quantized_normal((24, 128), "nf4", 64, double_quant=True)
    torch.library.opcheck(lora_linear_4bit.default, (x, *q, 24, bias, a, b, scaling, *drop))


def test_compiled_autograd_takes_its_node() -> None:
    """As torch._dynamo.config.compiled_autograd has it, of what runs eagerly forward."""
    a, b, scaling = adapters((8, 4), 48, 256)
    leaves = [torch.randn(5, 256), torch.randn(48), *a, *b]
    grad, forward = torch.randn(5, 48), fused(WEIGHT, 48, scaling)
    eager = with_gradients(forward, leaves, grad)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        torch.testing.assert_close(with_gradients(forward, leaves, grad), eager)
