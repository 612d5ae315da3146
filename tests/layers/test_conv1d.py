"""GPT-2's linear layers are transformers' Conv1D, whose weight is [in, out]: quantized, adapted, merged and saved."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from random_layers import randomize_adapters
from tiny_model import load, tiny_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from qlora_ext import (
    Linear4bit,
    LoraConfig,
    LoraLinear,
    add_adapter,
    delete_adapter,
    load_adapter,
    merge_adapter,
    quantize_4bit,
    quantize_model,
    save_adapter,
    unmerge_adapter,
)

NAMES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]  # attn.c_proj is square: only its values tell
IDS = torch.arange(20).view(2, 10)
both = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4-bit"])


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=258, n_positions=64)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def base(quantized: bool) -> GPT2LMHeadModel:
    return quantize_model(gpt2()) if quantized else gpt2()


def adapted(quantized: bool) -> GPT2LMHeadModel:
    model = base(quantized)
    add_adapter(model, LoraConfig(r=4))
    randomize_adapters(model)
    return model


def convs(model: nn.Module) -> dict[str, Conv1D]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}


def test_each_is_quantized_from_its_matrix() -> None:
    model, plain = quantize_model(gpt2()), gpt2()
    assert not convs(model)
    assert list(convs(plain)) == [f"transformer.h.{i}.{name}" for i in (0, 1) for name in NAMES]
    for name, conv in convs(plain).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear4bit)
        assert (layer.out_features, layer.in_features) == (conv.nf, conv.nx)
        assert torch.equal(layer.weight, quantize_4bit(conv.weight.T)[0])
        assert torch.equal(layer.bias, conv.bias)
        conv.weight = nn.Parameter(layer.dequantize().T)
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_float_checkpoint_goes_into_the_quantized_model(device: str) -> None:
    with torch.device(device):
        model = GPT2LMHeadModel(gpt2().config)
    quantize_model(model.eval())
    model.load_state_dict(gpt2().state_dict(), assign=device == "meta")
    model.tie_weights()
    assert torch.equal(logits(model), logits(base(quantized=True)))


def test_a_weight_of_the_wrong_shape_is_refused_as_it_is_stored() -> None:
    layer = Linear4bit.from_linear(Conv1D(128, 64))
    with pytest.raises(ValueError, match=r"expected shape \[64, 128\], got \[128, 64\]"):
        layer.load_state_dict({"weight": torch.zeros(128, 64)})


def test_a_folder_is_quantized_as_it_is_loaded(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, quantize={})), logits(base(quantized=True)))


@both
def test_adapters_add_their_product(quantized: bool) -> None:
    model = adapted(quantized)
    name = "transformer.h.0.attn.c_attn"
    layer = model.get_submodule(name)
    assert isinstance(layer, LoraLinear)
    assert (layer.in_features, layer.out_features) == (64, 192)
    x = torch.randn(3, 64)
    expected = (
        layer.base_layer(x) + layer.scaling["default"] * x @ layer.lora_A["default"].T @ layer.lora_B["default"].T
    )
    torch.testing.assert_close(layer(x), expected)
    if not quantized:
        assert layer.weight.shape == (64, 192)
        torch.testing.assert_close(x @ layer.weight + layer.bias, expected)
    torch.testing.assert_close(layer.merged_weight() @ x[0] + layer.bias, expected[0])
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.lora_B["default"].grad.any() for layer in model.modules() if isinstance(layer, LoraLinear))
    delete_adapter(model, "default")
    assert torch.equal(logits(model), logits(base(quantized)))


@both
def test_merged_and_back(quantized: bool) -> None:
    model = adapted(quantized)
    before = logits(model)
    merge_adapter(model)
    if not quantized:
        torch.testing.assert_close(logits(model), before)
    assert not torch.equal(logits(model), logits(base(quantized)))
    unmerge_adapter(model)
    assert torch.equal(logits(model), before)


@both
def test_dequantized_it_is_transformers_model_again(quantized: bool, tmp_path: Path) -> None:
    model = adapted(quantized)
    before = logits(model)
    merge_adapter(model, dequantize=True)
    assert list(convs(model)) == list(convs(gpt2()))
    torch.testing.assert_close(logits(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path)), logits(model))


def pefts_base(quantized: bool) -> GPT2LMHeadModel:
    model = base(quantized)
    if quantized:
        merge_adapter(model, dequantize=True)
    return model


@both
def test_peft_reads_ours(quantized: bool, tmp_path: Path) -> None:
    model = adapted(quantized)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out")
        theirs = peft.PeftModel.from_pretrained(pefts_base(quantized), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model))


@both
def test_we_read_pefts(quantized: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules="all-linear", r=4, fan_in_fan_out=True)
    theirs = peft.get_peft_model(pefts_base(quantized), config).eval()
    for name, parameter in theirs.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    model = base(quantized)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs))


def test_a_copy_and_a_pickled_layer_know_their_class(tmp_path: Path) -> None:
    layer = Linear4bit.from_linear(Conv1D(128, 64))
    torch.save(layer, tmp_path / "layer.pt")
    for twin in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        holder = nn.ModuleDict({"c": twin})
        merge_adapter(holder, dequantize=True)
        assert holder["c"].weight.shape == (64, 128)
        assert type(holder["c"]) is Conv1D


def test_a_subclass_is_what_it_was_made_of_but_computes_as_it_wants() -> None:
    """fully_shard and parametrizations make subclasses."""
    layer = nn.utils.parametrizations.weight_norm(Conv1D(48, 64), dim=None)
    model = nn.Sequential(layer, nn.Linear(48, 8))
    quantize_model(model)
    assert model[0] is layer
    add_adapter(model, LoraConfig(r=2, target_modules=["0"]))
    assert (model[0].in_features, model[0].out_features, list(model[0].weight.shape)) == (64, 48, [64, 48])
    randomize_adapters(model)
    x = torch.randn(3, 64)
    before = model(x)
    merge_adapter(model)
    torch.testing.assert_close(model(x), before)

    class Halved(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2  # type: ignore[no-any-return]

    model = quantize_model(nn.Sequential(Halved(48, 64), nn.Linear(48, 128)))
    assert isinstance(model[0], Halved)
    add_adapter(model, LoraConfig(r=2))
    assert isinstance(model[0], Halved)
    with pytest.raises(ValueError, match=r"got only subclasses of it \(Halved\)"):
        quantize_model(nn.Sequential(Halved(48, 64)))


def test_only_transformers_conv1d_is_one() -> None:
    other = type("Conv1D", (nn.Linear,), {})(64, 64)
    assert quantize_model(nn.Sequential(other, nn.Linear(64, 64)))[0] is other
    with pytest.raises(ValueError, match=r"Linear4bit\.from_linear.*got Conv1D itself"):
        quantize_model(Conv1D(48, 64))


def test_dequantizing_draws_no_numbers_and_keeps_the_mode() -> None:
    model = base(quantized=True).train()
    model.transformer.h[0].mlp.c_fc.eval()
    before = torch.get_rng_state()
    merge_adapter(model, dequantize=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [conv.training for conv in convs(model).values()] == [True, True, False, *[True] * 5]
    assert all(conv.weight.is_contiguous() for conv in convs(model).values())
