"""Adapters of which only A or only B trains, as in LoRA-FA (arXiv 2308.03303)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expert_cases import adapters, ends, stack
from random_layers import BASES, make_base, make_lora
from reference import assert_same
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_ext import LoraConfig, LoraLinear

FROZEN = ("lora_A", "lora_B")
by_base = pytest.mark.parametrize("base", BASES)


def frozen_layer(base: str, frozen: str, p: float = 0.0) -> LoraLinear:
    layer = make_lora(make_base(base).requires_grad_(False), *[LoraConfig(r=8, lora_dropout=p)] * 2)
    getattr(layer, frozen).requires_grad_(False)
    return layer


def is_kept(forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether the backward pass of `forward` holds its input."""
    x = torch.randn(6, 256, requires_grad=True) * 2
    storage = StorageWeakRef(x.untyped_storage())
    y = forward(x)
    del x
    assert y.requires_grad
    return not storage.expired()


@by_base
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_x_is_kept_only_for_the_gradient_of_a(compiled: bool, p: float, base: str) -> None:
    torch._dynamo.reset()
    layer = frozen_layer(base, "lora_A", p)
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    assert not is_kept(forward)
    layer.lora_A["a1"].requires_grad_(True)
    if torch.__version__ < "2.12":
        torch._dynamo.reset()  # which does not look at that again, nor at nn.Linear's
    assert is_kept(forward) or (p and base == "nn.Linear")  # whose dropout is torch's: it keeps x * mask


def test_experts_keep_x_only_for_the_gradient_of_a() -> None:
    q, _ = stack(256, 192, is_transposed=False)
    a, b, scaling = adapters((8, 4), 256, 192)

    def forward(x: Tensor) -> Tensor:
        y, _ = torch.ops.qlora_ext.lora_experts_4bit(x, *q, ends(2, 0, 3, 1), 192, False, a, b, scaling)
        return y

    for factor in b:
        factor.requires_grad_()
    assert not is_kept(forward)
    a[1].requires_grad_()
    assert is_kept(forward)


@by_base
@pytest.mark.parametrize("p", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_gradients_are_those_beside_the_others(backend: str | None, frozen: str, p: float, base: str) -> None:
    layer = make_lora(make_base(base), *[LoraConfig(r=8, lora_dropout=p)] * 2)
    x = torch.randn(2, 3, 256, requires_grad=True)
    grad = torch.randn(2, 3, 48)

    torch._dynamo.reset()  # it compiles LoraLinear.forward a few times only

    def gradients() -> dict[str, Tensor]:
        forward = layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)
        torch.manual_seed(3)
        forward(x).backward(grad)
        found = {name: t.grad for name, t in (("x", x), *layer.named_parameters()) if t.grad is not None}
        for t in (x, *layer.parameters()):
            t.grad = None
        return found

    everything = gradients()
    getattr(layer, frozen).requires_grad_(False)
    assert_same(gradients(), {name: g for name, g in everything.items() if not name.startswith(frozen)})


def test_what_is_not_kept_may_change() -> None:
    layer = frozen_layer("Linear4bit", "lora_A")
    x = torch.randn(6, 256, requires_grad=True)
    leaves = [x, *layer.lora_B.parameters()]
    expected = torch.autograd.grad(layer(x * 2).sum(), leaves)
    doubled = x * 2
    y = layer(doubled)
    doubled.zero_()
    assert_same(torch.autograd.grad(y.sum(), leaves), expected)
