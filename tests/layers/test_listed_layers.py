"""Layers that a module also holds in a list, which its forward goes through: Mask2Former's heads."""

from __future__ import annotations

import copy

import torch
from random_layers import names_of, randomize_adapters
from reference import assert_same
from torch import nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMLPPredictionHead

from qlora_ext import Linear4bit, LoraConfig, LoraLinear, add_adapter, merge_adapter, quantize_model

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def quantized() -> nn.Sequential:
    return quantize_model(nn.Sequential(Mask2FormerMLPPredictionHead(64, 64, 64, 3)))  # type: ignore[return-value]


def linear_layers(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    """Of the head in their order, by names; each also in the list that forward goes through."""
    blocks = model[0].layers  # type: ignore[index]
    assert all(block.layers[0] is block._modules["0"] for block in blocks)
    return names_of(model, kind)


def test_the_model_computes_with_the_layers_that_it_has() -> None:
    names = {"0.0.0", "0.1.0", "0.2.0"}
    model = quantized()
    assert linear_layers(model, Linear4bit) == names
    y = X
    for i in range(3):
        layer = model.get_submodule(f"0.{i}.0")
        y = nn.functional.linear(y, layer.dequantize(torch.float32), layer.bias)
        y = y.relu() if i < 2 else y
    torch.testing.assert_close(model(X), y)

    add_adapter(model, LoraConfig(r=2))
    assert linear_layers(model, LoraLinear) == names
    randomize_adapters(model)
    adapted = model(X)
    assert (adapted - y).norm() > 0.01 * y.norm()
    adapted.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert_same(copy.deepcopy(model)(X), adapted)

    merge_adapter(model, dequantize=True)
    assert linear_layers(model, nn.Linear) == names
    torch.testing.assert_close(model(X), adapted, rtol=1e-4, atol=1e-5)
    assert model.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
