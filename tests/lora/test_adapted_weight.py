"""What a model finds that reads the weight of a layer with adapters instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_layers import make_linear, make_lora, randomize_adapters
from reference import assert_same
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import MobileBertConfig, MobileBertForMaskedLM

from qlora_ext import LoraConfig, LoraLinear, add_adapter, quantize_model

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layer() -> LoraLinear:
    torch.manual_seed(1)
    layer = make_lora(nn.Linear(64, 48), LoraConfig(r=2))
    randomize_adapters(layer)
    return layer


def test_it_is_what_the_layer_computes_with_and_trains_its_adapters(layer: LoraLinear) -> None:
    torch.testing.assert_close(X @ layer.weight.T + layer.bias, layer(X))
    layer.weight.sum().backward()
    read = layer.lora_A["a0"].grad.clone()
    layer.lora_A["a0"].grad = None
    (layer(torch.eye(64)) - layer.bias).sum().backward()
    torch.testing.assert_close(layer.lora_A["a0"].grad, read)
    layer.merge()
    assert layer.weight is layer.merged_base.weight
    layer.unmerge()
    layer.active_adapters = []
    assert layer.weight is layer.base_layer.weight


def test_it_is_in_the_bases_dtype_and_rounded_once(layer: LoraLinear) -> None:
    layer.bfloat16()
    assert_same(layer.weight.detach(), layer.merged_weight().bfloat16())
    layer.active_adapters = []
    assert layer.weight is layer.base_layer.weight


class Doubled(torch.autograd.Function):
    """As kernels of others, to which a model hands weights: it calls no __torch_function__."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def test_it_is_a_tensor_of_the_moment_at_which_it_was_read(layer: LoraLinear) -> None:
    """Not one that is computed later: such hands an autograd.Function no gradients, and C++ no memory."""
    weight = layer.weight
    assert type(weight) is Tensor
    before = weight.detach().clone()
    Doubled.apply(weight).sum().backward()
    assert layer.lora_A["a0"].grad.any()
    with torch.no_grad():
        layer.lora_B["a0"].add_(1)
    assert torch.equal(weight, before)
    other = nn.Linear(64, 48)
    other.weight.data = weight
    torch.testing.assert_close(other.weight, before)


@pytest.mark.parametrize("merged", [False, True])
def test_in_4_bits_only_its_form_can_be_read(merged: bool) -> None:
    """Models look at a weight's dtype before they cast x; bytes would be wrong to compute with, or to change."""
    layer = make_lora(make_linear(), LoraConfig())
    layer.merge() if merged else None
    weight: Any = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.uint8, torch.device("cpu"), (48, 128))
    assert (weight.size(1), weight.requires_grad, weight.is_floating_point()) == (128, False, False)
    assert (torch.numel(weight), torch.is_floating_point(weight)) == (48 * 128, False)
    assert not isinstance(weight, Tensor)
    weight.requires_grad = False
    x = torch.randn(3, 256)
    uses: list[Callable[[], Any]] = [
        *(lambda: weight.mul_(2), lambda: weight.data, lambda: weight.T),
        *(lambda: F.linear(x, weight), lambda: x @ weight, lambda: weight @ x, lambda: x * weight),
        *(lambda: weight * 0.1, lambda: 2 * weight, lambda: -weight, lambda: weight[0], lambda: list(weight)),
        *(lambda: torch.cat([weight]), lambda: torch._foreach_mul([weight], 2)),
        *(lambda: setattr(weight, "data", x), lambda: setattr(weight, "requires_grad", True)),
    ]
    for use in uses:
        with pytest.raises(
            AttributeError, match=r"LoraLinear: weight\.\w+: .* float weight .*skip=.*got Linear4bit"
        ) as got:
            use()
        assert got.value.obj is layer


def test_a_model_that_concatenates_a_weight_in_4_bits_is_told() -> None:
    sizes = {"hidden_size": 64, "embedding_size": 64, "intra_bottleneck_size": 64, "intermediate_size": 64}
    config = MobileBertConfig(**sizes, num_hidden_layers=1, vocab_size=100, num_attention_heads=4)
    model = quantize_model(MobileBertForMaskedLM(config).eval())
    add_adapter(model, LoraConfig(r=2))
    with pytest.raises(AttributeError, match=r"LoraLinear: weight\.\w+: .*skip"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("quantized", [False, True])
def test_factors_of_16_bits_are_scaled_in_float32(quantized: bool) -> None:
    """As load_state_dict(assign=True) may leave them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    model = quantize_model(model) if quantized else model
    add_adapter(model, LoraConfig(r=8, lora_alpha=2.4))
    randomize_adapters(model)
    layer = model[0]
    for table in (layer.lora_A, layer.lora_B):
        table["default"] = nn.Parameter(table["default"].detach().bfloat16())
    low_rank = X.double() @ layer.lora_A["default"].double().T @ layer.lora_B["default"].double().T
    expected = layer.base_layer(X).double() + 0.3 * low_rank
    torch.testing.assert_close(layer(X).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(X @ layer.merged_weight().T + layer.bias, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_weight_of_two_tensors_is_not_merged_into() -> None:
    """As torchao's, which looks as a float tensor does."""
    base = nn.Linear(64, 48)
    base.weight = nn.Parameter(TwoTensor(torch.randn(48, 64), torch.randn(48, 64)), requires_grad=False)
    layer = make_lora(base, LoraConfig(r=2))
    with pytest.raises(TypeError, match="float weight"):
        layer.merge()
    assert not isinstance(layer.weight, Tensor)


def test_bytes_of_another_shape_are_no_float_weight() -> None:
    """As bitsandbytes' 4-bit weights are."""
    base = nn.Linear(64, 48)
    base.weight = nn.Parameter(torch.zeros(48 * 32, 1, dtype=torch.uint8), requires_grad=False)
    layer = make_lora(base, LoraConfig(r=2))
    assert layer.weight.dtype is torch.uint8
    with pytest.raises(AttributeError, match="float weight"):
        _ = layer.weight.T
