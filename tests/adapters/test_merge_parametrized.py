"""Merging into layers with parametrizations: what would compute otherwise afterwards is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_layers import randomize_adapters
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from qlora_ext import LoraConfig, add_adapter, merge_adapter, quantize_model

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class HalvedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class HalvedConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("kind", [HalvedLinear, HalvedConv1D])
def test_a_parametrized_layer_that_computes_in_its_own_way_is_not_merged(kind: Any, dequantize: bool) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(kind(64, 64), dim=None))
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    before = model(X)
    with pytest.raises(TypeError, match=r"merge_adapter: 0: .*without parametrizations, got Parametrized"):
        merge_adapter(model, dequantize=dequantize)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("dequantize", [False, True])
def test_hooks_of_a_parametrized_layer_are_not_lost(dequantize: bool) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    before = model(X)
    with pytest.raises(TypeError, match=r"merge_adapter: 0: .*without parametrizations, got Parametrized"):
        merge_adapter(model, dequantize=dequantize)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_pruned_layer_is_merged_with_what_is_left_of_it(dequantize: bool) -> None:
    """Its hook does no more than put the masked weight there, which then is in the merged one."""
    model = nn.Sequential(nn.Linear(64, 64))
    prune.l1_unstructured(model[0], "weight", 0.5)
    add_adapter(model, LoraConfig(r=2))
    randomize_adapters(model)
    before = model(X)
    merge_adapter(model, dequantize=dequantize)
    assert type(model[0] if dequantize else model[0].merged_base) is nn.Linear
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_parametrized_bias_is_not_merged(quantized: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(64, 64))
    model = quantize_model(model) if quantized else model
    add_adapter(model, LoraConfig(r=2))
    nn.utils.parametrize.register_parametrization(model[0].base_layer, "bias", nn.Identity())
    with pytest.raises(TypeError, match=r"merge_adapter: 0: .*weight and bias without parametrizations"):
        merge_adapter(model)
