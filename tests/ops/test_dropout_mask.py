"""Which elements dropout keeps: the op's part. That they are random is tested in tests/cpp/test_dropout_mask.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import reference
import torch
from reference import assert_same
from torch import Tensor

dropout_mask = torch.ops.qlora_ext.dropout_mask
X, SEED = torch.empty(64, 100), torch.tensor(7)


@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (2, 5, 100), (300, 512)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_seed_stands_for_one_mask_on_every_path_and_with_any_threads(
    threads: int, shape: tuple[int, ...], cpu_path: str
) -> None:
    torch.set_num_threads(threads)
    mask = dropout_mask(torch.empty(shape, dtype=torch.bfloat16), 0.9, SEED)
    assert mask.is_contiguous()
    assert_same(mask, reference.dropout_mask(shape, 0.9, 7))


def test_it_depends_on_nothing_but_shape_probability_and_seed() -> None:
    mask = dropout_mask(X, 0.5, SEED)
    assert_same(dropout_mask(torch.ones(100, 64).t().half().requires_grad_(), 0.5, SEED), mask)
    assert not mask.requires_grad
    assert_same(dropout_mask(X, 0.5, torch.tensor(-7)), reference.dropout_mask(X.shape, 0.5, -7))
    for seed in (-7, 0, 6, 8):
        assert abs((dropout_mask(X, 0.5, torch.tensor(seed)) == mask).float().mean() - 0.5) < 5 / 160
    for keep in (1.0, 1 - 2**-33):  # which is 1, to 32 bits
        assert dropout_mask(X, keep, SEED).all()
        assert not dropout_mask(X, 1 - keep, SEED).any()


def test_opcheck() -> None:
    torch.library.opcheck(dropout_mask.default, (torch.empty(3, 64), 0.5, SEED))


BAD_CALLS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    **{
        f"keep-{keep}": (partial(dropout_mask, X, keep, SEED), ValueError, rf"keep: .* in \[0, 1\], got {keep}")
        for keep in (-0.1, 1.5, math.nan)
    },
    "seed-dtype": (partial(dropout_mask, X, 0.5, SEED.int()), TypeError, "seed: expected dtype int64, got Int"),
    "seed-device": (partial(dropout_mask, X, 0.5, SEED.to("meta")), ValueError, "seed: expected device cpu, got meta"),
    "seed-count": (partial(dropout_mask, X, 0.5, torch.arange(2)), ValueError, r"seed: expected 1 number, got \[2\]"),
}


@pytest.mark.parametrize(("bad_call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors(bad_call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"dropout_mask: {message}"):
        bad_call()
