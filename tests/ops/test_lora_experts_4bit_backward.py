"""The op by itself; that its results are the gradients is in test_lora_experts_4bit.py."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from cases import DTYPES, normal
from expert_cases import ends, stack
from reference import assert_same

backward = torch.ops.qlora_ext.lora_experts_4bit_backward
Q, _ = stack(256, 192, is_transposed=False)
GRAD, X, XA, OFFS = normal(7, 192), normal(7, 256), normal(7, 8), ends(2, 0, 3, 1)
A, B = [normal(4, 3, 256), normal(4, 5, 256)], [normal(4, 192, 3), normal(4, 192, 5)]
SCALING = [0.5, 2.0]
ALL = [True, True, True]
MASKS = list(product([False, True], repeat=3))


def test_shapes_and_dtypes(cpu_path: str) -> None:
    half = [t.bfloat16() for t in (GRAD, X, XA)]
    grad_x, grad_a, grad_b = backward(*half, *Q, OFFS, False, A, B, SCALING, *ALL)
    assert (grad_x.shape, grad_x.dtype) == (X.shape, torch.bfloat16)
    for got, like in ((grad_a, A), (grad_b, B)):
        assert [(g.shape, g.dtype) for g in got] == [(t.shape, torch.float32) for t in like]


def test_experts_without_rows_have_gradients_of_zero(cpu_path: str) -> None:
    for counts in ((2, 0, 3, 1), (0, 0, 6, 0), (0, 0, 0, 0)):
        grad_x, grad_a, grad_b = backward(GRAD, X, XA, *Q, ends(*counts), False, A, B, SCALING, *ALL)
        assert not grad_x[sum(counts) :].any()
        for gradient in (*grad_a, *grad_b):
            assert [bool(each.any()) for each in gradient] == [count > 0 for count in counts]


@pytest.mark.parametrize("wanted", MASKS, ids=str)
def test_only_where_wanted(wanted: tuple[bool, ...], cpu_path: str) -> None:
    """Without the gradients of A, x is not read: any tensor of its shape will do."""
    everything = backward(GRAD, X, XA, *Q, OFFS, False, A, B, SCALING, *ALL)
    x = X if wanted[1] else torch.tensor(math.nan).expand(X.shape)
    for got, is_wanted, expected in zip(
        backward(GRAD, x, XA, *Q, OFFS, False, A, B, SCALING, *wanted), wanted, everything, strict=True
    ):
        assert_same(got, expected if is_wanted else [] if isinstance(expected, list) else expected.new_empty(0))


BAD = {
    "grad-dtype": ({"grad": GRAD.double()}, TypeError, "grad: .*Float.*Double"),
    "grad-rows": ({"grad": GRAD[1:]}, ValueError, r"grad: .*\[7, 192\].*\[6, 192\]"),
    "grad-columns": ({"grad": GRAD[:, 1:]}, ValueError, "packed: "),
    "grad-dimensions": ({"grad": GRAD[0]}, ValueError, "grad: expected 2 dimensions"),
    "x-columns": ({"x": X[:, 1:]}, ValueError, "packed: "),
    "xA-dtype": ({"xA": XA.bfloat16()}, TypeError, "xA: .*Float.*BFloat16"),
    "xA-shape": ({"xA": XA[:, 1:]}, ValueError, r"xA: .*\[7, 8\].*\[7, 7\]"),
    "A-shape": ({"A": [A[0], A[1][..., 1:]]}, ValueError, "A: "),
    "offs": ({"offs": ends(2, 0, 3, 7)}, ValueError, "offs: .*at most 7 rows"),
    "device": ({"x": X.to("meta")}, ValueError, ".*meta"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
def test_errors(changed: dict[str, object], error: type[Exception], message: str) -> None:
    names = ("grad", "x", "xA", "packed", "absmax", "nested_absmax", "nested_offset", "quant_type", "blocksize", "offs")
    arguments = dict(zip(names, (GRAD, X, XA, *Q, OFFS), strict=True))
    arguments |= {
        "is_transposed": False,
        "A": A,
        "B": B,
        "scaling": SCALING,
        "with_grad_x": True,
        "with_grad_A": True,
        "with_grad_B": True,
    }
    with pytest.raises(error, match=f"^lora_experts_4bit_backward: {message}"):
        backward(**(arguments | changed))


@pytest.mark.parametrize("wanted", MASKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_opcheck(dtype: torch.dtype, wanted: tuple[bool, ...]) -> None:
    given = [t.to(dtype) for t in (GRAD, X, XA)]
    torch.library.opcheck(backward.default, (*given, *Q, OFFS, False, A, B, SCALING, *wanted))
