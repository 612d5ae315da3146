"""The op by itself; the module around it is tested in test_experts.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import DTYPES, normal, pairwise, quantized_normal
from expert_cases import COUNTS, SHAPES, ends, plain, stack
from reference import Quantized, assert_as_exact_as_torch, assert_same
from torch import Tensor

experts_4bit = torch.ops.qlora_ext.experts_4bit


@pytest.mark.parametrize(
    ("dtype_name", "shape", "counts", "is_transposed"), pairwise(DTYPES, SHAPES, COUNTS, (False, True)), ids=str
)
def test_values_and_gradients_as_exact_as_torch(
    dtype_name: str, shape: str, counts: str, is_transposed: bool, cpu_path: str
) -> None:
    dtype, (size_in, size_out), (rows, behind) = DTYPES[dtype_name], SHAPES[shape], COUNTS[counts]
    q, weight = stack(size_in, size_out, is_transposed)
    offs = ends(*rows)
    x = normal(sum(rows) + behind, size_in, dtype=dtype).requires_grad_()
    grad = normal(len(x), size_out, dtype=dtype, seed=2)
    results, of_torch, exact = [], [], []
    y = experts_4bit(x, *q, offs, size_out, is_transposed)
    for found, product, leaf in ((results, y, x), (of_torch, plain(x, weight.to(dtype), offs), x)):
        found += [product.detach(), *torch.autograd.grad(product, leaf, grad)]
    leaf = x.detach().double().requires_grad_()
    product = plain(leaf, weight.double(), offs)
    exact += [product.detach(), *torch.autograd.grad(product, leaf, grad.double())]
    for each in zip(results, of_torch, exact, strict=True):
        assert_as_exact_as_torch(*each)
    assert not y[sum(rows) :].any()


def test_each_expert_has_the_bytes_of_a_linear_layer(cpu_path: str) -> None:
    q, _ = stack(256, 192, is_transposed=False)
    x, offs = normal(9, 256, dtype=torch.bfloat16), ends(4, 0, 5, 0)
    y = experts_4bit(x, *q, offs, 192, False)
    packed, absmax, nested_absmax = (t.view(4, -1, *t.shape[1:]) for t in q[:3] if t is not None)
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 9))):
        one = packed[expert], absmax[expert], nested_absmax[expert], *q[3:]
        assert_same(y[rows], torch.ops.qlora_ext.linear_4bit(x[rows], *one, 192, None))


def test_one_expert_may_have_unfinished_blocks(cpu_path: str) -> None:
    q, x = quantized_normal((7, 24), "nf4", 64, double_quant=True), torch.randn(5, 24)
    got = torch.ops.qlora_ext.experts_4bit(x, *q, torch.tensor([5]), 7, False)
    assert_same(got, torch.ops.qlora_ext.linear_4bit(x, *q, 7, None))


def test_what_is_not_contiguous_gives_the_same(cpu_path: str) -> None:
    q, _ = stack(256, 192, is_transposed=True)
    x, offs = normal(9, 256), ends(4, 0, 5, 0)
    expected = experts_4bit(x, *q, offs, 192, True)
    spread = torch.stack([offs, offs], 1).long()[:, 0]
    assert_same(experts_4bit(x.T.contiguous().T, *q, spread, 192, True), expected)


def test_it_is_known_to_wait() -> None:
    """So that no CUDA graph takes it in."""
    for op in (experts_4bit, torch.ops.qlora_ext.lora_experts_4bit, torch.ops.qlora_ext.lora_experts_4bit_backward):
        assert torch.Tag.cudagraph_unsafe in op.default.tags


def test_no_gradient_is_none() -> None:
    q, _ = stack(96, 128, is_transposed=False)
    x = normal(6, 96).requires_grad_()
    y = experts_4bit(x, *q, ends(2, 0, 3, 1), 128, False)
    none = torch.autograd.grad(torch._C._functions.UndefinedGrad()(y).sum(), x, allow_unused=True)
    assert none == (None,)


def test_tangents_of_gradients_raise() -> None:
    q, _ = stack(96, 128, is_transposed=False)
    x = normal(6, 96).requires_grad_()
    y = experts_4bit(x, *q, ends(2, 0, 3, 1), 128, False)
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match=r"^experts_4bit: forward mode AD: expected tensors without tangents"):
            torch.autograd.grad(y, x, grad)


def test_gradients_of_gradients() -> None:
    q, weight = stack(96, 128, is_transposed=False)
    offs, second = ends(2, 0, 3, 1), []
    for product in (lambda x: experts_4bit(x, *q, offs, 128, False), lambda x: plain(x, weight, offs)):
        x = normal(6, 96).requires_grad_()
        (first,) = torch.autograd.grad(product(x).sin().sum(), x, create_graph=True)
        second += torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(*second)


Q, _ = stack(256, 192, is_transposed=False)
X, OFFS = normal(6, 256), ends(2, 0, 3, 1)


def call(x: Tensor = X, q: Quantized = Q, offs: Tensor = OFFS, out_features: int = 192) -> Tensor:
    result: Tensor = experts_4bit(x, *q, offs, out_features, False)
    return result


MANY = 2**20  # matrices of 2^22 x 2^22: more elements than int64 counts, which wraps to 0, as many as these have
NONE: Quantized = (torch.empty(0, dtype=torch.uint8), torch.empty(0), None, None, "nf4", 64)


BAD: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "x-dtype": (partial(call, X.double()), TypeError, "x: .*Double"),
    "x-dimensions": (partial(call, X[0]), ValueError, r"x: expected 2 dimensions, got \[256\]"),
    "x-columns": (partial(call, X[:, 1:]), ValueError, "packed: .*97920.*98304"),
    "x-device": (partial(call, X.to("meta")), ValueError, ".*meta"),
    "out-features": (partial(call, out_features=191), ValueError, "packed: .*97792.*98304"),
    "out-features-negative": (partial(call, out_features=-1), ValueError, "out_features: expected at least 0, got -1"),
    "offs-dtype": (partial(call, offs=OFFS.float()), TypeError, "offs: expected dtype int32 or int64, got Float"),
    "offs-dimensions": (partial(call, offs=OFFS[None]), ValueError, r"offs: expected 1 dimension.*\[1, 4\]"),
    "offs-none": (partial(call, offs=OFFS[:0]), ValueError, r"offs: .*one end at least, got \[0\]"),
    "offs-order": (partial(call, offs=ends(4, -1, 1, 0)), ValueError, r"offs: .*ascending.*6 rows, got \[4, 3, 4, 4\]"),
    "offs-behind": (partial(call, offs=ends(4, 1, 1, 1)), ValueError, r"offs: .*at most 6 rows, got \[4, 5, 6, 7\]"),
    "offs-device": (partial(call, offs=OFFS.to("meta")), ValueError, "offs: expected device cpu, got meta"),
    "matrices": (
        partial(call, X[:, :24], quantized_normal((4 * 7, 24), "nf4", 64, double_quant=False), out_features=7),
        ValueError,
        "packed: expected matrices of whole blocks, got 24 x 7",
    ),
    "elements": (
        partial(call, torch.ones(1, 4 * MANY), NONE, torch.ones(MANY, dtype=torch.int32), out_features=4 * MANY),
        ValueError,
        r"packed: expected a weight of fewer than 2\^63 elements",
    ),
    "groups": (
        partial(call, X[:, :64], quantized_normal((4 * 64, 64), "nf4", 64, double_quant=True), out_features=64),
        ValueError,
        "packed: expected matrices of whole groups of 256 blocks, got 64 x 64",
    ),
}


@pytest.mark.parametrize(("bad_call", "error", "message"), BAD.values(), ids=BAD)
def test_errors(bad_call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^experts_4bit: {message}"):
        bad_call()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_opcheck(dtype: torch.dtype, is_transposed: bool) -> None:
    q, _ = stack(256, 192, is_transposed)
    x = normal(8, 256, dtype=dtype).requires_grad_()
    torch.library.opcheck(experts_4bit.default, (x, *q, ends(2, 0, 3, 1), 192, is_transposed))
