"""torch.utils.flop_counter counts the ops' products as it counts those of plain torch."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
import torch.utils.flop_counter
from expert_cases import adapters, ends, plain, plain_lora, stack
from random_layers import make_linear, make_lora
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import qlora_ext
from qlora_ext import LoraConfig, LoraLinear


class Plain(nn.Module):
    """A layer of 4 bits and its adapters, by torch's own products."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        lora = layer if isinstance(layer, LoraLinear) else None
        self.weight = (lora.base_layer if lora else layer).dequantize()
        self.pairs = [(lora.lora_A[name], lora.lora_B[name]) for name in lora.active_adapters] if lora else []

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        for a, b in self.pairs:
            y = y + F.linear(F.linear(x, a), b)
        return y


def flops(model: nn.Module, x: Tensor, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward and y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("ranks", [(), (8,), (8, 4)], ids=["no adapter", "one", "two"])
@pytest.mark.parametrize("x_requires_grad", [False, True], ids=["first", "later"])
def test_counts_experts(x_requires_grad: bool, ranks: tuple[int, ...]) -> None:
    """Both passes."""
    q, weight = stack(256, 192, is_transposed=False)
    a, b, scaling = adapters(ranks, 256, 192)
    x, *ab = leaves = [t.requires_grad_() for t in (torch.randn(6, 256), *a, *b)]
    x.requires_grad_(x_requires_grad)
    offs, counts = ends(2, 0, 3, 1), []
    for ours in (True, False):
        with FlopCounterMode(display=False) as counter:
            if not ours:
                y = plain_lora(x, weight, offs, ab, scaling)[0] if ranks else plain(x, weight, offs)
            elif ranks:
                y, _ = torch.ops.qlora_ext.lora_experts_4bit(
                    x, *q, offs, 192, False, ab[: len(ranks)], ab[len(ranks) :], scaling
                )
            else:
                y = torch.ops.qlora_ext.experts_4bit(x, *q, offs, 192, False)
            if any(leaf.requires_grad for leaf in leaves):
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("ranks", [(), (8,), (8, 4)], ids=["no adapter", "one", "two"])
@pytest.mark.parametrize("x_requires_grad", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("shape", [(256,), (3, 5, 256), (0, 256)], ids=str)
def test_counts(shape: tuple[int, ...], backward: bool, x_requires_grad: bool, ranks: tuple[int, ...]) -> None:
    layer = make_linear()
    model = make_lora(layer, *(LoraConfig(r=r) for r in ranks)) if ranks else layer
    x = torch.randn(shape, requires_grad=x_requires_grad)
    assert flops(model, x, backward) == flops(Plain(model), x, backward)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@pytest.mark.parametrize("x_requires_grad", [False, True], ids=["first", "later"])
def test_counts_no_gradient_of_a_frozen_factor(x_requires_grad: bool, frozen: str) -> None:
    model = make_lora(make_linear(), LoraConfig(r=8), LoraConfig(r=4))
    getattr(model, frozen).requires_grad_(False)
    x = torch.randn(3, 256, requires_grad=x_requires_grad)
    assert flops(model, x, backward=True) == flops(Plain(model), x, backward=True)


@pytest.mark.parametrize("first", ["qlora_ext", "torch.utils.flop_counter"])
def test_counts_whichever_is_imported_first(first: str) -> None:
    code = (
        "import torch, sys; before = set(sys.modules)\n"
        f"import {first}, qlora_ext; print('triton' in set(sys.modules) - before)\n"
        "import importlib.util; importlib.util.find_spec('torch.utils.flop_counter')  # as those do who ask for it\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.qlora_ext.lora_linear_4bit_backward in flop_registry"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert first != "qlora_ext" or done.stdout == "False\n"


def test_the_package_may_be_loaded_again() -> None:
    """Of formulas that are registered twice, torch makes an error."""
    assert torch.utils.flop_counter
    importlib.reload(qlora_ext)
