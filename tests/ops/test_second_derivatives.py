"""Derivatives of gradients (create_graph), as a penalty on gradients or a Hessian-vector product takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, quantized_normal
from lora_cases import masks
from reference import assert_as_exact_as_torch, assert_same, dequantize_4bit
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

ops = torch.ops.qlora_ext
M, N, K = 5, 48, 256
WEIGHT = quantized_normal((N, K), "nf4", 64, double_quant=True)
DENSE = dequantize_4bit(WEIGHT, (N, K), torch.float32)
SCALING, KEEP, SEED = [2.0, 0.5], [0.5, 1.0], torch.tensor([3, 4])

Product = Callable[..., Tensor]


def plain(weight: Tensor, keep: Sequence[float] = ()) -> dict[str, Product]:
    """The products in plain PyTorch, in the dtype of x."""

    def lora(x: Tensor, bias: Tensor, *ab: Tensor) -> Tensor:
        y, count, mask = F.linear(x, weight, bias), len(ab) // 2, masks(x, keep, SEED)
        for i, (a, b, scaling) in enumerate(zip(ab[:count], ab[count:], SCALING, strict=False)):
            xA = F.linear(x * mask[i] if mask else x, a.to(x.dtype))
            y = y + scaling * F.linear(xA, b.to(x.dtype))
        return y

    return {"linear_4bit": lora, "linear_4bit_dgrad": lambda grad: grad @ weight, "lora_linear_4bit": lora}


def ours(keep: Sequence[float] = ()) -> dict[str, Product]:
    def lora(x: Tensor, bias: Tensor, *ab: Tensor) -> Tensor:
        count = len(ab) // 2
        dropout = (keep, SEED[:count]) if keep else ((), None)
        y, _ = ops.lora_linear_4bit(x, *WEIGHT, N, bias, ab[:count], ab[count:], SCALING[:count], *dropout)
        return y

    return {
        "linear_4bit": lambda x, bias: ops.linear_4bit(x, *WEIGHT, N, bias),
        "linear_4bit_dgrad": lambda grad: ops.linear_4bit_dgrad(grad, *WEIGHT, K),
        "lora_linear_4bit": lora,
    }


def leaves_of(op: str, dtype: torch.dtype) -> list[Tensor]:
    if op == "linear_4bit_dgrad":
        return [torch.randn(M, N).to(dtype)]
    x_and_bias = [torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)]
    if op == "linear_4bit":
        return x_and_bias
    ranks = (8, 3)
    return [*x_and_bias, *(torch.randn(r, K) / 16 for r in ranks), *(torch.randn(N, r) * 0.1 for r in ranks)]


def twice_differentiated(product: Product, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of a nonlinear function of y for the leaves, and those of a nonlinear function of them."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    first = torch.autograd.grad(product(*leaves).sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(torch.stack([g.double().square().sum() for g in first]).sum(), leaves)
    return [g.detach() for g in first], list(second)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dgrad", "lora_linear_4bit", "lora_linear_4bit-dropout"])
def test_as_exact_as_torch(op: str, dtype: torch.dtype, cpu_path: str) -> None:
    op, *dropout = op.split("-")
    keep = KEEP if dropout else []
    leaves = leaves_of(op, dtype)
    results = twice_differentiated(ours(keep)[op], leaves)
    low = twice_differentiated(plain(DENSE.to(dtype), keep)[op], leaves)
    in_fp64 = [leaf.double() for leaf in leaves]
    exact = twice_differentiated(plain(DENSE.double(), keep)[op], in_fp64)
    for got, torch_results, exact_results in zip(results, low, exact, strict=True):
        for each in zip(got, torch_results, exact_results, strict=True):
            assert_as_exact_as_torch(*each)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("keep", [[], KEEP], ids=["", "dropout"])
def test_of_frozen_a_as_exact_as_torch(keep: list[float], dtype: torch.dtype, cpu_path: str) -> None:
    """Where x itself is not kept: the gradient of B leads to x through x A^T."""
    x, bias, *ab = leaves_of("lora_linear_4bit", dtype)
    a, b = ab[:2], ab[2:]

    def with_frozen(lora: Product, to: Callable[[Tensor], Tensor] = Tensor.float) -> Product:
        return lambda x, bias, *b: lora(x, bias, *map(to, a), *b)

    results = twice_differentiated(with_frozen(ours(keep)["lora_linear_4bit"]), [x, bias, *b])
    low = twice_differentiated(with_frozen(plain(DENSE.to(dtype), keep)["lora_linear_4bit"]), [x, bias, *b])
    in_fp64 = with_frozen(plain(DENSE.double(), keep)["lora_linear_4bit"], Tensor.double)
    exact = twice_differentiated(in_fp64, [leaf.double() for leaf in (x, bias, *b)])
    for got, torch_results, exact_results in zip(results, low, exact, strict=True):
        for each in zip(got, torch_results, exact_results, strict=True):
            assert_as_exact_as_torch(*each)


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dgrad"])
def test_create_graph_changes_no_byte(op: str, cpu_path: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in leaves_of(op, torch.bfloat16)]
    y = ours()[op](*leaves).square().sum()
    expected = torch.autograd.grad(y, leaves, retain_graph=True)
    assert_same([g.detach() for g in torch.autograd.grad(y, leaves, create_graph=True)], list(expected))


def test_each_adapter_has_its_own_mask(cpu_path: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in leaves_of("lora_linear_4bit", torch.float32)]
    loss = ours([0.5, 0.5])["lora_linear_4bit"](*leaves).sin().sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves, create_graph=True), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (2, 0, K)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    _, *others = leaves_of("lora_linear_4bit", torch.float32)
    x, product = torch.randn(shape), ours(KEEP)["lora_linear_4bit"]
    _, results = twice_differentiated(product, [x, *others])
    _, flat = twice_differentiated(product, [x.view(-1, K), *others])
    for got, expected in zip(results, flat, strict=True):
        assert_same(got, expected.view(got.shape))


def test_masked_out_elements_do_not_count() -> None:
    """Not even an Inf."""
    x, *others = leaves_of("lora_linear_4bit", torch.float32)
    [mask] = masks(x, KEEP[:1], SEED)
    leaves = [leaf.requires_grad_() for leaf in others[1::2]]  # A and B of one adapter
    y = ours(KEEP[:1])["lora_linear_4bit"](torch.where(mask, x, torch.inf), None, *leaves)
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
    assert all(g.isfinite().all() for g in first)


def test_an_adapters_gradients_are_computed_in_float32() -> None:
    x, bias, *ab = leaves_of("lora_linear_4bit", torch.bfloat16)
    got, _ = twice_differentiated(ours()["lora_linear_4bit"], [x, bias, *ab])
    y = ours()["lora_linear_4bit"](x, bias, *ab).detach().requires_grad_()
    (grad,) = torch.autograd.grad(y.sin().sum(), y)
    scaled = SCALING[0] * grad.float()
    torch.testing.assert_close(got[2], (scaled @ ab[2]).T @ x.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[4], scaled.T @ (x.float() @ ab[0].T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dgrad", "lora_linear_4bit"])
def test_symbolic_sizes_stay_so(op: str) -> None:
    leaves = leaves_of(op, torch.float32)

    def second(*args: Tensor) -> list[Tensor]:
        return twice_differentiated(ours()[op], args)[1]

    traced = make_fx(second, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*leaves)
    more = [torch.cat([leaves[0], leaves[0]]), *leaves[1:]]
    torch.testing.assert_close(traced(*more), second(*more))


def test_no_gradient_is_none() -> None:
    """Of y, when only xA is asked for."""
    leaves = [leaf.requires_grad_() for leaf in leaves_of("lora_linear_4bit", torch.float32)]
    y = ours()["lora_linear_4bit"](*leaves)
    none = torch.autograd.grad(torch._C._functions.UndefinedGrad()(y).sum(), leaves, allow_unused=True)
    assert none == (None,) * len(leaves)


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_dgrad", "lora_linear_4bit"])
def test_tangents_raise(op: str) -> None:
    """In forward mode, of what is given and of gradients."""
    leaves = [leaf.requires_grad_() for leaf in leaves_of(op, torch.float32)]
    y = ours()[op](*leaves)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaves[0].detach(), torch.ones_like(leaves[0]))
        with pytest.raises(RuntimeError, match=r"jvp|forward mode AD"):
            ours()[op](dual, *leaves[1:])
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match=r"jvp|forward mode AD|tangents of gradients: expected none"):
            torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("lists", ["B", "scaling", "keep", "seed"])
def test_lists_of_other_lengths_are_named_on_meta(lists: str) -> None:
    """Where no kernel checks them."""
    x, _, *ab = (leaf.to("meta").requires_grad_() for leaf in leaves_of("lora_linear_4bit", torch.float32))
    scaling, keep = SCALING[: 1 if lists == "scaling" else 2], KEEP[: 1 if lists == "keep" else 2]
    weight = [t.to("meta") if isinstance(t, Tensor) else t for t in WEIGHT]
    b, seed = ab[2 : 3 if lists == "B" else 4], SEED[: 1 if lists == "seed" else 2].to("meta")
    with pytest.raises(ValueError, match=f"lora_linear_4bit: {lists}: expected 2 as in A, got 1"):
        ops.lora_linear_4bit(x, *weight, N, None, ab[:2], b, scaling, keep, seed)


def test_under_autocast_gradients_stay_in_fp32() -> None:
    """As without create_graph: it is the dtype of x that decides."""
    leaves = leaves_of("lora_linear_4bit", torch.float32)
    expected, _ = twice_differentiated(ours()["lora_linear_4bit"], leaves)
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = twice_differentiated(ours()["lora_linear_4bit"], leaves)
    assert_same(first, expected)


def test_only_where_asked() -> None:
    """The first layer's x wants no gradient; a frozen adapter's are constants."""
    x, _, *ab = leaves_of("lora_linear_4bit", torch.float32)

    def second(products: dict[str, Product], dtype: torch.dtype) -> Tensor:
        a = ab[0].to(dtype, copy=True).requires_grad_()
        y = products["lora_linear_4bit"](x.to(dtype), None, a, ab[2].to(dtype))
        (first,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        (of_first,) = torch.autograd.grad(first.square().sum(), a)
        return of_first

    got, exact = second(ours(), torch.float32), second(plain(DENSE.double()), torch.float64)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_the_second_derivative_of_a_linear_function_is_none() -> None:
    x = torch.randn(M, K).requires_grad_()
    (grad_x,) = torch.autograd.grad(ops.linear_4bit(x, *WEIGHT, N, None).sum(), x, create_graph=True)
    assert not grad_x.requires_grad
