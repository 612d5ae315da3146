"""Activation checkpointing runs forward again for the backward pass, and ends that by an exception: in the midst of the
op that saves the last tensor that is needed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from expert_cases import adapters, ends, stack
from random_layers import BASES, make_base, make_lora
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_ext import LoraConfig


def outlives(forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether something keeps the input of `forward` after its backward pass."""
    x = torch.randn(6, 256, requires_grad=True)  # a leaf: kept by what keeps a node, though no values may be
    left = weakref.ref(x)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    del x
    gc.collect()
    return left() is not None


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("frozen", ["", "lora_A", "lora_B"])
@pytest.mark.parametrize("base", BASES)
def test_a_layer_keeps_nothing(base: str, frozen: str, p: float) -> None:
    layer = make_lora(make_base(base).requires_grad_(False), *[LoraConfig(r=8, lora_dropout=p)] * 2)
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    assert not outlives(layer)


@pytest.mark.parametrize("trained", ["A", "B", "AB"])
def test_experts_keep_nothing(trained: str) -> None:
    q, _ = stack(256, 192, is_transposed=False)
    a, b, scaling = adapters((8, 4), 256, 192)
    for name, factors in (("A", a), ("B", b)):
        for factor in factors:
            factor.requires_grad_(name in trained)

    def forward(x: Tensor) -> Tensor:
        y, _ = torch.ops.qlora_ext.lora_experts_4bit(x, *q, ends(2, 0, 3, 1), 192, False, a, b, scaling)
        return y

    assert not outlives(forward)
