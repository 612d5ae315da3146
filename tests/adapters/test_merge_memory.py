"""What a merge takes and keeps alive, and what it stops at."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from random_layers import BASES, make_base, make_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_ext import LoraConfig, add_adapter, merge_adapter, quantize_model, set_adapter
from qlora_ext.adapters import merge


def layers(quantized: bool) -> nn.Module:
    model: nn.Module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    return quantize_model(model) if quantized else model


@pytest.mark.parametrize("quantized", [False, True])
def test_each_base_goes_as_soon_as_it_is_merged(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the old model and the new one are in memory together."""
    model = layers(quantized)
    bases = [weakref.ref(layer) for layer in model]
    add_adapter(model, LoraConfig(r=2))
    alive: list[int] = []
    dense = merge.dense

    def counted(*args: Any) -> nn.Module:
        gc.collect()
        alive.append(sum(base() is not None for base in bases))
        return dense(*args)

    monkeypatch.setattr(merge, "dense", counted)
    merge_adapter(model, dequantize=True)
    assert alive == [6, 5, 4, 3, 2, 1]


class WholeWeights(TorchDispatchMode):
    """Counts the tensors of at least this many elements that ops make."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [str(func)] * len(self._memory(result) - self._memory((args, kwargs)))
        return result

    def _memory(self, tensors: Any) -> set[int]:
        large = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.numel() >= self.numel]
        return {t.untyped_storage().data_ptr() for t in large}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_merge_makes_one_float_weight_and_what_it_is_kept_in(base: str, dtype: torch.dtype, adapters: int) -> None:
    """A large weight's copies do not fit beside the model, and memory that nobody has written yet is slow."""
    layer = make_lora(make_base(base, dtype=dtype), *[LoraConfig(r=2)] * adapters)
    with WholeWeights(layer.in_features * layer.out_features) as weights:
        merge_adapter(nn.Sequential(layer))
    kept = 0 if base == "Linear4bit" or dtype is torch.float32 else 1  # in 4 bits it has half as many elements
    assert len(weights.made) == 1 + kept, weights.made


def test_a_merge_that_adds_nothing_leaves_tied_weights_tied() -> None:
    model = nn.Sequential(nn.Embedding(48, 64), nn.Linear(64, 64), nn.Linear(64, 48))
    model[2].weight = model[0].weight
    add_adapter(model, LoraConfig(target_modules=["1", "2"]))
    set_adapter(model, None)
    merge_adapter(model, dequantize=True)
    assert model[2].weight.data_ptr() == model[0].weight.data_ptr()


@pytest.mark.parametrize("value", [65519.0, 65520.0, -65519.0, -65520.0, torch.nan])
@pytest.mark.parametrize("dequantize", [False, True])
def test_one_number_that_fp16_does_not_hold_stops_it(dequantize: bool, value: float) -> None:
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.float16))
    add_adapter(model, LoraConfig(r=1, lora_alpha=1))
    A, B = model[0].lora_A["default"].data.zero_(), model[0].lora_B["default"].data
    A[0, 3], B[5, 0] = 1, value
    model[0].base_layer.weight.data.zero_()
    if abs(value) < 65520:  # from there on it rounds to Inf
        merge_adapter(model, dequantize=dequantize)
        assert model[0].weight.float().abs().sum() == 65504
    else:
        with pytest.raises(ValueError, match="merge_adapter: 0: expected finite values with default"):
            merge_adapter(model, dequantize=dequantize)


def test_layers_in_a_dtype_that_nothing_decodes_to_become_dense_in_it() -> None:
    model = layers(quantized=True)
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    wanted = [layer.dequantize(torch.float32).double() for layer in model[1:]]
    merge_adapter(model.double(), dequantize=True)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model[1:], wanted, strict=True))


def test_what_cannot_be_merged_is_named() -> None:
    model = layers(quantized=False)
    add_adapter(model, LoraConfig(r=2))
    model[3].lora_A.to("meta")
    with pytest.raises(ValueError, match=r"^merge_adapter: 3: .*lora_A.default: expected device cpu, got meta"):
        merge_adapter(model)


def test_a_weight_of_another_shape_is_not_merged_into() -> None:
    base = nn.Linear(64, 48)
    base.weight = nn.Parameter(torch.randn(48 * 64), requires_grad=False)
    with pytest.raises(TypeError, match=r"float weight \[48, 64\] to merge into"):
        make_lora(base, LoraConfig(r=2)).merge()
