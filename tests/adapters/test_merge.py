"""merge_adapter and unmerge_adapter: what the merged weights are, and that the way back is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted_model import TOKENS, everything, logits
from cases import DTYPES
from random_layers import BASES, make_base, make_lora, names_of, randomize_adapters, state_bytes, with_gradients
from reference import assert_as_exact_as_torch, assert_same, dequantize_4bit, quantize
from tiny_model import tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import qlora_ext
from qlora_ext import (
    Linear4bit,
    LoraConfig,
    LoraLinear,
    add_adapter,
    merge_adapter,
    quantize_model,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)

by_base = pytest.mark.parametrize("base", BASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def make_model(base: str = "Linear4bit", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two active adapters, "a" on all layers and "b" on some, and an inactive one."""
    model = LlamaForCausalLM(tiny_config()).eval().to(dtype)
    if base == "Linear4bit":
        quantize_model(model)
    add_adapter(model, LoraConfig(), "a")
    add_adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]), "b")
    add_adapter(model, LoraConfig(target_modules=["q_proj"]), "inactive")
    randomize_adapters(model)
    set_adapter(model, ["a", "b"])
    return model


def exact_lora(base: str, dtype: torch.dtype) -> tuple[LoraLinear, Tensor]:
    """Two adapters whose B A are small whole numbers, so scaling B A has no rounding error; and W0 + their sum."""
    layer = make_lora(make_base(base, dtype=dtype), LoraConfig(r=4, lora_alpha=2), LoraConfig(r=2, lora_alpha=0.5))
    for parameter in (*layer.lora_A.values(), *layer.lora_B.values()):
        parameter.data = torch.randint(-1, 2, parameter.shape).float()
    weight = layer.base_layer.dequantize(torch.float32) if base == "Linear4bit" else layer.base_layer.weight.float()
    for name in ("a0", "a1"):
        weight = weight + layer.scaling[name] * (layer.lora_B[name] @ layer.lora_A[name])
    return layer, weight.detach()


# --- what is merged -------------------------------------------------------------------------------------------------


@by_dtype
def test_merged_linear_holds_the_sum(dtype: torch.dtype) -> None:
    layer, weight = exact_lora("nn.Linear", dtype)
    merge_adapter(model := nn.Sequential(layer))
    merged = nn.Linear(256, 48, dtype=dtype)
    merged.load_state_dict({"weight": weight.to(dtype), "bias": layer.base_layer.bias})
    x = torch.randn(3, 256).to(dtype)
    assert_same(model(x), merged(x))


@by_dtype
def test_merged_4bit_layer_holds_the_sum_quantized_again(dtype: torch.dtype) -> None:
    layer, weight = exact_lora("Linear4bit", dtype)
    merge_adapter(model := nn.Sequential(layer))
    again = Linear4bit(256, 48, dtype=dtype)
    again.load_state_dict({"weight": weight, "bias": layer.base_layer.bias})
    assert_same(again.dequantize(), dequantize_4bit(quantize(weight, double_quant=True), (48, 256), dtype))
    x = torch.randn(3, 256).to(dtype)
    assert_same(model(x), again(x))


@by_base
@by_dtype
def test_dequantized_merge_is_one_rounding_from_the_sum(dtype: torch.dtype, base: str) -> None:
    layer, weight = exact_lora(base, dtype)
    model = nn.Sequential(layer)
    merge_adapter(model, dequantize=True)
    assert type(model[0]) is nn.Linear
    assert model[0].bias is layer.base_layer.bias
    assert_same(model[0].weight.detach(), weight.to(dtype))
    assert not model[0].weight.requires_grad


@by_base
def test_merged_sum_of_trained_values_is_as_exact_as_torch(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig(), LoraConfig(r=3))
    low = layer.base_layer.dequantize() if base == "Linear4bit" else layer.base_layer.weight.detach()
    exact = low.double()
    for name in ("a0", "a1"):
        a, b = layer.lora_A[name].detach(), layer.lora_B[name].detach()
        low = low + layer.scaling[name] * (b @ a)
        exact = exact + layer.scaling[name] * (b.double() @ a.double())
    model = nn.Sequential(layer)
    merge_adapter(model, dequantize=True)
    assert_as_exact_as_torch(model[0].weight.detach(), low, exact)


def test_merged_float_model_computes_the_same() -> None:
    model = make_model("nn.Linear")
    expected = logits(model)
    merge_adapter(model)
    torch.testing.assert_close(logits(model), expected)


@by_base
def test_merged_layer_passes_the_gradient_of_x(base: str) -> None:
    layer = make_lora(make_base(base), LoraConfig())
    merge_adapter(nn.Sequential(layer))
    _, grad_x = with_gradients(layer, [torch.randn(3, 256)])
    merged = layer.merged_base
    weight = merged.dequantize() if isinstance(merged, Linear4bit) else merged.weight
    torch.testing.assert_close(grad_x, torch.ones(3, 48) @ weight)


# --- the way back ---------------------------------------------------------------------------------------------------


@by_base
@by_dtype
def test_unmerge_restores_every_bit(dtype: torch.dtype, base: str) -> None:
    model = make_model(base, dtype)
    before, expected = everything(model), logits(model)
    for _ in range(10):
        merge_adapter(model)
        assert (logits(model) != expected).any()
        unmerge_adapter(model)
        assert everything(model) == before
    assert_same(logits(model), expected)


@by_base
def test_training_goes_on_after_unmerge_as_if_never_merged(base: str) -> None:
    model = make_model(base)
    twin = copy.deepcopy(model)
    merge_adapter(model)
    unmerge_adapter(model)
    for each in (model, twin):
        each.train()
        each(TOKENS, labels=TOKENS).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert_same(parameter.grad, other.grad)


@by_base
def test_a_cast_while_merged_is_the_same_as_a_cast_after(base: str) -> None:
    model = make_model(base)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    merge_adapter(model)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    unmerge_adapter(model)
    assert state_bytes(model) == state_bytes(twin)
    assert_same(logits(model), logits(twin))


@by_base
def test_eval_and_train_while_merged_are_without_dropout(base: str) -> None:
    model = nn.Sequential(make_lora(make_base(base), LoraConfig(lora_dropout=0.5)))
    merge_adapter(model)
    assert_same(model.train()(x := torch.randn(3, 256)), model.eval()(x))
    assert not model[0].merged_base.training


@by_base
def test_adapters_saved_while_merged_are_the_adapters(base: str, tmp_path: Path) -> None:
    model = make_model(base)
    save_adapter(model, tmp_path / "before", "a")
    merge_adapter(model)
    save_adapter(model, tmp_path / "merged", "a")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()


@by_base
def test_a_state_dict_is_the_same_merged_or_not_and_loads_into_either(base: str) -> None:
    source = make_model(base)
    state, unmerged_logits = state_bytes(source), logits(source)
    merge_adapter(source)
    assert state_bytes(source) == state
    merged_logits = logits(source)
    for merged, expected in ((True, merged_logits), (False, unmerged_logits)):
        model = make_model(base)
        if merged:
            merge_adapter(model)
        model.load_state_dict(source.state_dict())
        assert_same(logits(model), expected)
    merge_adapter(model)
    unmerge_adapter(model)
    assert state_bytes(model) == state


def test_a_state_dict_that_cannot_be_merged_leaves_no_old_merged_weight() -> None:
    model = nn.Sequential(make_lora(make_base("Linear4bit"), LoraConfig()))
    merge_adapter(model)
    with pytest.raises(ValueError, match="finite"):
        model.load_state_dict(model.state_dict() | {"0.lora_B.a0": torch.full((48, 8), torch.nan)})
    assert model(torch.ones(1, 256)).isnan().all()


# --- dequantize=True ------------------------------------------------------------------------------------------------


@by_base
@by_dtype
def test_dequantized_model_is_plain_and_loads_with_transformers(dtype: torch.dtype, base: str, tmp_path: Path) -> None:
    model = make_model(base, dtype)
    expected = logits(model)
    merge_adapter(model, dequantize=True)
    assert not names_of(model, LoraLinear) | names_of(model, Linear4bit)
    assert repr(model) == repr(LlamaForCausalLM(tiny_config()))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert (logits(model) - expected).norm() < 10 * torch.finfo(dtype).eps * expected.norm()
    model.save_pretrained(tmp_path)
    assert state_bytes(LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == state_bytes(model)


def test_dequantize_needs_no_active_adapter() -> None:
    model = make_model()
    set_adapter(model, None)
    expected = logits(model)
    merge_adapter(model, dequantize=True)
    torch.testing.assert_close(logits(model), expected)

    quantized = quantize_model(nn.Sequential(nn.Linear(64, 8)))
    weight = quantized[0].dequantize()
    merge_adapter(quantized, dequantize=True)
    assert_same(quantized[0].weight.detach(), weight)


# --- what is refused ------------------------------------------------------------------------------------------------

WHILE_MERGED: dict[str, Callable[[nn.Module, Path], object]] = {
    "add_adapter": lambda model, _: add_adapter(model, LoraConfig(), "new"),
    "set_adapter": lambda model, _: set_adapter(model, "a"),
    "delete_adapter": lambda model, _: qlora_ext.delete_adapter(model, "a"),
    "merge_adapter": lambda model, _: merge_adapter(model),
    "merge_adapter-dequantize": lambda model, _: merge_adapter(model, dequantize=True),
    "load_adapter-new": lambda model, folder: qlora_ext.load_adapter(model, folder, "new"),
    "load_adapter-existing": lambda model, folder: qlora_ext.load_adapter(model, folder, "a"),
}


@pytest.mark.parametrize("operation", WHILE_MERGED)
def test_refused_while_merged(operation: str, tmp_path: Path) -> None:
    model = make_model()
    save_adapter(model, tmp_path, "a")
    randomize_adapters(model)
    merge_adapter(model)
    before = everything(model)
    with pytest.raises(ValueError, match=rf"{operation.split('-')[0]}.*merged.*unmerge_adapter"):
        WHILE_MERGED[operation](model, tmp_path)
    assert everything(model) == before


def test_unmerge_without_merge() -> None:
    with pytest.raises(ValueError, match=r"unmerge_adapter.*merged.*none"):
        unmerge_adapter(make_model())


def test_merge_without_active_adapter() -> None:
    model = make_model()
    set_adapter(model, None)
    with pytest.raises(ValueError, match=r"merge_adapter.*active.*none"):
        merge_adapter(model)


@by_base
@pytest.mark.parametrize("dequantize", [False, True], ids=["", "dequantize"])
@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_an_adapter_that_is_not_finite_is_named_and_not_merged(value: float, dequantize: bool, base: str) -> None:
    """As after a training that diverged; with dequantize it could not be undone."""
    model = make_model(base, torch.float16)
    nn.init.constant_(model.model.layers[1].mlp.up_proj.lora_B["b"], value)
    before = everything(model)
    with pytest.raises(ValueError, match=r"merge_adapter.*layers\.1\.mlp\.up_proj.*finite"):
        merge_adapter(model, dequantize=dequantize)
    assert everything(model) == before


def test_an_adapter_named_twice_counts_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    add_adapter(model, LoraConfig(r=2))
    nn.init.ones_(model[0].lora_B["default"])
    once = model(torch.ones(1, 8))
    set_adapter(model, ["default", "default"])
    assert torch.equal(model(torch.ones(1, 8)), once)
