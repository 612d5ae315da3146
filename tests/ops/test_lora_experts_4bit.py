"""Experts with adapters as one op; the modules around it are tested in test_lora_experts.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from cases import DTYPES, normal, pairwise
from expert_cases import COUNTS, SHAPES, adapters, ends, plain_lora, stack
from reference import assert_as_exact_as_torch, assert_same
from torch import Tensor

lora_experts_4bit = torch.ops.qlora_ext.lora_experts_4bit
RANKS = {"r8": (8,), "r5-r16": (5, 16)}
Q, _ = stack(256, 192, is_transposed=False)
X, OFFS, A, B = normal(6, 256), ends(2, 0, 3, 1), normal(4, 8, 256), normal(4, 192, 8)


@pytest.mark.parametrize(
    ("dtype_name", "shape", "counts", "ranks", "is_transposed"),
    pairwise(DTYPES, SHAPES, COUNTS, RANKS, (False, True)),
    ids=str,
)
def test_values_and_gradients_as_exact_as_torch(
    dtype_name: str, shape: str, counts: str, ranks: str, is_transposed: bool, cpu_path: str
) -> None:
    dtype, (size_in, size_out), (rows, behind) = DTYPES[dtype_name], SHAPES[shape], COUNTS[counts]
    q, weight = stack(size_in, size_out, is_transposed)
    a, b, scaling = adapters(RANKS[ranks], size_in, size_out)
    offs, x = ends(*rows), normal(sum(rows) + behind, size_in, dtype=dtype)
    grad = normal(len(x), size_out, dtype=dtype, seed=2)

    def results(forward: Callable[..., Sequence[Tensor]], *leaves: Tensor) -> list[Tensor]:
        leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
        y, xA = forward(*leaves)
        gradients = torch.autograd.grad(y, leaves, grad.to(y.dtype))
        return [y.detach(), xA.detach()[: sum(rows)], *gradients]

    def ours(x: Tensor, *ab: Tensor) -> Sequence[Tensor]:
        factors = ab[: len(a)], ab[len(a) :]
        both: Sequence[Tensor] = lora_experts_4bit(x, *q, offs, size_out, is_transposed, *factors, scaling)
        return both

    def of_torch(x: Tensor, *ab: Tensor) -> Sequence[Tensor]:
        return plain_lora(x, weight.to(x.dtype), offs, ab, scaling)

    low, exact = results(of_torch, x, *a, *b), results(of_torch, *(t.double() for t in (x, *a, *b)))
    for each in zip(results(ours, x, *a, *b), low, exact, strict=True):
        assert_as_exact_as_torch(*each)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zero_b_changes_nothing(dtype: torch.dtype, is_transposed: bool, cpu_path: str) -> None:
    q, _ = stack(256, 192, is_transposed)
    a, b, scaling = adapters((8, 4), 256, 192)
    x, offs = normal(80, 256, dtype=dtype), ends(1, 4, 0, 70)
    y, _ = lora_experts_4bit(x, *q, offs, 192, is_transposed, a, [torch.zeros_like(each) for each in b], scaling)
    assert_same(y, torch.ops.qlora_ext.experts_4bit(x, *q, offs, 192, is_transposed))


def test_gradients_only_where_asked() -> None:
    q, _ = stack(256, 192, is_transposed=False)
    a, b, scaling = adapters((8, 4), 256, 192)
    leaves, grad = [normal(6, 256), *a, *b], normal(6, 192, seed=2)

    def gradients(wanted: Sequence[int]) -> list[Tensor]:
        asked = [leaf.clone().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        y, _ = lora_experts_4bit(asked[0], *q, ends(2, 0, 3, 1), 192, False, asked[1:3], asked[3:], scaling)
        return list(torch.autograd.grad(y, [asked[i] for i in wanted], grad))

    together = gradients(range(5))
    for i in range(5):
        assert_same(gradients([i]), [together[i]])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_forms_of_arguments_and_a_second_backward(is_transposed: bool, cpu_path: str) -> None:
    """Rows that are not contiguous, one number expanded to a gradient, ranks of 1 and of more than 32."""
    q, _ = stack(256, 192, is_transposed)
    a, b, scaling = adapters((1, 40), 256, 192)
    x, offs = normal(9, 256, dtype=torch.bfloat16), ends(4, 0, 5, 0)
    found = []
    for spread in (False, True):
        leaves = [t.detach().requires_grad_() for t in (x.T.contiguous().T if spread else x, *a, *b)]
        y, xA = lora_experts_4bit(leaves[0], *q, offs, 192, is_transposed, leaves[1:3], leaves[3:], scaling)
        assert not xA.requires_grad
        grad = torch.ones((), dtype=torch.bfloat16).expand(9, 192)
        found.append(torch.autograd.grad(y, leaves, grad if spread else grad.contiguous(), retain_graph=True))
        assert_same(list(torch.autograd.grad(y, leaves, grad)), list(found[-1]))
    assert_same(list(found[1]), list(found[0]))


def test_no_gradient_is_none_and_tangents_of_gradients_raise() -> None:
    x, a, b = leaves = [t.clone().requires_grad_() for t in (X, A, B)]
    y, _ = lora_experts_4bit(x, *Q, OFFS, 192, False, [a], [b], [0.5])
    none = torch.autograd.grad(torch._C._functions.UndefinedGrad()(y).sum(), leaves, allow_unused=True)
    assert none == (None,) * 3
    y, _ = lora_experts_4bit(x, *Q, OFFS, 192, False, [a], [b], [0.5])
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match=r"^lora_experts_4bit: forward mode AD: expected tensors without"):
            torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_in_16_bits_get_gradients_in_16_bits(dtype: torch.dtype) -> None:
    q, _ = stack(256, 192, is_transposed=False)
    a, b, scaling = adapters((8,), 256, 192)
    leaves = [t.to(dtype).requires_grad_() for t in (*a, *b)]
    in_32_bits = [t.detach().float().requires_grad_() for t in leaves]
    grads = []
    for ab in (leaves, in_32_bits):
        y, _ = lora_experts_4bit(X, *q, OFFS, 192, False, ab[:1], ab[1:], scaling)
        grads.append(torch.autograd.grad(y.square().sum(), ab))
    for got, same in zip(*grads, strict=True):
        assert_same(got, same.to(dtype))


@pytest.mark.parametrize("lists", ["B", "scaling"])
def test_lists_of_other_lengths_are_named_on_meta(lists: str) -> None:
    """Where no kernel checks them."""
    x, offs, a, b = (t.to("meta") for t in (X, OFFS, A, B))
    weight = [t.to("meta") if isinstance(t, Tensor) else t for t in Q]
    B_given, scaling = [b] * (1 if lists == "B" else 2), [0.5] * (1 if lists == "scaling" else 2)
    with pytest.raises(ValueError, match=f"lora_experts_4bit: {lists}: expected 2 as in A, got 1"):
        lora_experts_4bit(x, *weight, offs, 192, False, [a, a], B_given, scaling)


def test_under_autocast_second_derivatives_stay_in_fp32() -> None:
    q, _ = stack(256, 192, is_transposed=False)
    a, b, scaling = adapters((8,), 256, 192)

    def first() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (X, *a, *b)]
        y, _ = lora_experts_4bit(leaves[0], *q, OFFS, 192, False, leaves[1:2], leaves[2:], scaling)
        return [g.detach() for g in torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)]

    expected = first()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(first(), expected)


@pytest.mark.parametrize("trains_a", [True, False])
def test_gradients_of_gradients(trains_a: bool) -> None:
    """And with rows behind the last end. With frozen A the gradient of B leads to x through x A^T."""
    q, weight = stack(96, 128, is_transposed=True)
    a, b, scaling = adapters((3, 2), 96, 128)
    offs = ends(2, 0, 3, 1)

    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, *ab = [t.to(dtype).requires_grad_() for t in (normal(7, 96), *a, *b)]
        for factor in ab[:2]:
            factor.requires_grad_(trains_a)
        leaves = [leaf for leaf in (x, *ab) if leaf.requires_grad]
        if dtype == torch.float32:
            y, _ = lora_experts_4bit(x, *q, offs, 128, True, ab[:2], ab[2:], scaling)
        else:
            y, _ = plain_lora(x, weight.to(dtype), offs, ab, scaling)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)

    for got, exact in zip(second(torch.float32), second(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def call(
    x: Tensor = X, a: Sequence[Tensor] = (A,), b: Sequence[Tensor] = (B,), scaling: Sequence[float] = (0.5,)
) -> Tensor:
    y: Tensor = lora_experts_4bit(x, *Q, OFFS, 192, False, a, b, scaling)[0]
    return y


BAD: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "x-dtype": (partial(call, X.double()), TypeError, "x: .*Double"),
    "a-none": (partial(call, a=(), b=(), scaling=()), ValueError, "A: .*at least 1"),
    "a-experts": (partial(call, a=(A[1:],)), ValueError, r"A: .*the first of 4, got \[3, 8, 256\]"),
    "a-dimensions": (partial(call, a=(A[0],)), ValueError, r"A: expected 3 dimensions.*\[8, 256\]"),
    "a-columns": (partial(call, a=(A[..., 1:],)), ValueError, "A: .*255"),
    "a-dtype": (partial(call, a=(A.double(),)), TypeError, "A: .*Double"),
    "a-device": (partial(call, a=(A.to("meta"),)), ValueError, "A: .*cpu.*meta"),
    "b-rank": (partial(call, b=(B[..., 1:],)), ValueError, "B: .*7"),
    "b-experts": (partial(call, b=(B[1:],)), ValueError, r"B: .*the first of 4, got \[3, 192, 8\]"),
    "b-length": (partial(call, b=()), ValueError, "B: .*1 tensors, as in A, got 0"),
    "scaling-length": (partial(call, scaling=()), ValueError, "scaling: .*1 numbers, as in A, got 0"),
}


@pytest.mark.parametrize(("bad_call", "error", "message"), BAD.values(), ids=BAD)
def test_errors(bad_call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^lora_experts_4bit: {message}"):
        bad_call()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("offs", [OFFS, ends(1, 0, 2, 1)], ids=["all", "rows-of-none"])
def test_opcheck(offs: Tensor, dtype: torch.dtype, is_transposed: bool) -> None:
    q, _ = stack(256, 192, is_transposed)
    a, b, scaling = adapters((8, 4), 256, 192)
    for tensor in (*a, *b):
        tensor.requires_grad_()
    x = normal(6, 256, dtype=dtype).requires_grad_()
    torch.library.opcheck(lora_experts_4bit.default, (x, *q, offs, 192, is_transposed, a, b, scaling))
