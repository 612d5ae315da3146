"""The op by itself; that its results are the gradients is in test_lora_linear_4bit.py."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from cases import DTYPES, normal, quantized_normal
from lora_cases import masks
from reference import assert_as_exact_as_torch, assert_same, dequantize_4bit
from torch import Tensor

backward = torch.ops.qlora_ext.lora_linear_4bit_backward
M, N, K = 6, 48, 256
Q = quantized_normal((N, K), "nf4", 64, double_quant=True)
GRAD, X, XA = normal(M, N), normal(M, K), normal(M, 8)
A, B = [normal(3, K), normal(5, K, seed=2)], [normal(N, 3), normal(N, 5, seed=2)]
SCALING, NONE, DROPOUT = [0.5, 2.0], ([], None), ([0.5, 0.9], torch.tensor([3, 4]))
ALL = [True, True, True]
MASKS = list(product([False, True], repeat=3))


def test_shapes_and_dtypes(cpu_path: str) -> None:
    """The adapters' gradients are stacked, float32 and B's transposed; grad_x has grad's leading dimensions."""
    x, grad = X.view(2, 3, K).bfloat16(), GRAD.view(2, 3, N).bfloat16()
    grad_x, grad_a, grad_b = backward(grad, x, XA.bfloat16(), *Q, A, B, SCALING, *NONE, *ALL)
    assert (grad_x.shape, grad_x.dtype) == ((2, 3, K), torch.bfloat16)
    assert (grad_a.shape, grad_a.dtype) == ((8, K), torch.float32)
    assert (grad_b.shape, grad_b.dtype) == ((8, N), torch.float32)


@pytest.mark.parametrize("dropout", [NONE, DROPOUT], ids=["", "dropout"])
def test_values(dropout: tuple[list[float], Tensor | None], cpu_path: str) -> None:
    grad_x, grad_a, grad_b = backward(GRAD, X, XA, *Q, A, B, SCALING, *dropout, *ALL)
    kept = masks(X, *dropout)
    parts = XA.double().split([3, 5], dim=1)
    exact_x = GRAD.double() @ dequantize_4bit(Q, (N, K), torch.float32).double()
    exact_a, exact_b = [], []
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        mask = kept[i].double() if kept else 1.0
        g = SCALING[i] * GRAD.double() @ b.double()
        exact_x += mask * (g @ a.double())
        exact_a.append(g.T @ (X.double() * mask))
        exact_b.append(SCALING[i] * parts[i].T @ GRAD.double())
    for got, exact in ((grad_x, exact_x), (grad_a, torch.cat(exact_a)), (grad_b, torch.cat(exact_b))):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


LONG = [
    (4, 64, 14336),
    (16, 64, 14336),
    (33, 64, 14336),
    (4, 14336, 64),
    (16, 14336, 64),
    (33, 14336, 64),
    (8192, 64, 64),
]


@pytest.mark.parametrize("mnk", LONG, ids=str)
def test_long_products_are_as_exact_as_torch(mnk: tuple[int, int, int], cpu_path: str) -> None:
    """xA, too, and whichever of the three is the long one."""
    m, n, k = mnk
    q = quantized_normal((n, k), "nf4", 64, double_quant=True)
    x, grad, a, b = (torch.randn(shape) for shape in ((m, k), (m, n), (16, k), (n, 16)))
    _, xa = torch.ops.qlora_ext.lora_linear_4bit(x, *q, n, None, [a], [b], [1.0], *NONE)
    _, grad_a, grad_b = backward(grad, x, xa, *q, [a], [b], [1.0], *NONE, False, True, True)
    x64, grad64, a64, b64 = (t.double() for t in (x, grad, a, b))
    assert_as_exact_as_torch(xa, x @ a.T, x64 @ a64.T)
    assert_as_exact_as_torch(grad_a, (grad @ b).T @ x, (grad64 @ b64).T @ x64)
    assert_as_exact_as_torch(grad_b, xa.T @ grad, xa.double().T @ grad64)


@pytest.mark.parametrize("wanted", MASKS, ids=str)
def test_only_where_wanted(wanted: tuple[bool, ...], cpu_path: str) -> None:
    """Without the gradients of A, x is not read: any tensor of its shape will do."""
    everything = backward(GRAD, X, XA, *Q, A, B, SCALING, *DROPOUT, *ALL)
    x = X if wanted[1] else torch.tensor(math.nan).expand(X.shape)
    for got, is_wanted, expected in zip(
        backward(GRAD, x, XA, *Q, A, B, SCALING, *DROPOUT, *wanted), wanted, everything, strict=True
    ):
        assert_same(got, expected if is_wanted else expected.new_empty(0))


def test_expanded_gradient(cpu_path: str) -> None:
    """What y.sum().backward() gives: one number seen as a matrix."""
    x, xa, grad = X.repeat(7, 1), XA.repeat(7, 1), torch.ones(()).expand(7 * M, N)
    assert_same(
        backward(grad, x, xa, *Q, A, B, SCALING, *NONE, *ALL),
        backward(grad.contiguous(), x, xa, *Q, A, B, SCALING, *NONE, *ALL),
    )


def test_neither_autograd_nor_autocast_sees_what_is_inside(cpu_path: str) -> None:
    """Nor do they in linear_4bit_dgrad."""
    calls = {
        "lora": lambda grad: backward(grad, X, XA, *Q, A, B, SCALING, *DROPOUT, *ALL),
        "dgrad": lambda grad: torch.ops.qlora_ext.linear_4bit_dgrad(grad, *Q, K),
    }
    for name, call in calls.items():
        expected = call(GRAD)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(call(GRAD), expected, msg=name)
        got = call(GRAD.clone().requires_grad_())
        assert_same(
            [t.detach() for t in got] if name == "lora" else got.detach(),
            expected if name == "dgrad" else list(expected),
        )


BAD = {
    "grad-dtype": ({"grad": GRAD.double()}, TypeError, "grad: .*Double"),
    "grad-rows": ({"grad": GRAD[1:]}, ValueError, "grad: .*6 rows.*5"),
    "x-scalar": ({"x": X[0, 0]}, ValueError, "x: "),
    "x-columns": ({"x": X[:, 1:]}, ValueError, "packed: "),
    "x-dtype": ({"x": X.bfloat16()}, TypeError, "x: .*Float.*BFloat16"),
    "xA-dtype": ({"xA": XA.bfloat16()}, TypeError, "xA: .*Float.*BFloat16"),
    "xA-rows": ({"xA": XA[:5]}, ValueError, r"xA: .*\[6, 8\].*\[5, 8\]"),
    "xA-shape": ({"xA": XA[:, 1:]}, ValueError, r"xA: .*\[6, 8\].*\[6, 7\]"),
    "A-shape": ({"A": [A[0], A[1][:, 1:]]}, ValueError, "A: "),
    "scaling": ({"scaling": [1.0]}, ValueError, "scaling: "),
    "keep": ({"keep": [0.5]}, ValueError, "keep: .*2, as in A, got 1"),
    "seed": ({"keep": [0.5, 0.5]}, ValueError, "seed: .*one beside keep, got none"),
    "device": ({"x": X.to("meta")}, ValueError, ".*meta"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
def test_errors(changed: dict[str, object], error: type[Exception], message: str) -> None:
    names = ("grad", "x", "xA", "packed", "absmax", "nested_absmax", "nested_offset", "quant_type", "blocksize")
    arguments = dict(zip(names, (GRAD, X, XA, *Q), strict=True))
    arguments |= {
        "A": A,
        "B": B,
        "scaling": SCALING,
        "keep": [],
        "seed": None,
        "with_grad_x": True,
        "with_grad_A": True,
        "with_grad_B": True,
    }
    with pytest.raises(error, match=f"^lora_linear_4bit_backward: {message}"):
        backward(**(arguments | changed))


@pytest.mark.parametrize("wanted", MASKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_opcheck(dtype: torch.dtype, wanted: tuple[bool, ...]) -> None:
    arguments = (GRAD.to(dtype), X.to(dtype), XA.to(dtype), *Q, A, B, SCALING, *DROPOUT, *wanted)
    torch.library.opcheck(backward.default, arguments)


@pytest.mark.parametrize(("n", "k"), [(24, 128), (64, 32)])
def test_many_ranks_beside_few_features(n: int, k: int) -> None:
    """r beyond the few columns or rows of a product: the strides that torch.compile is promised."""
    q = quantized_normal((n, k), "nf4", 32, double_quant=True)
    grad, x, xa, a, b = (torch.randn(shape) for shape in ((64, n), (64, k), (64, 40), (40, k), (n, 40)))
    torch.library.opcheck(backward.default, (grad, x, xa, *q, [a], [b], [2.0], *NONE, *ALL))
