"""Adapters pass between PEFT and here through their files, both ways, with the same results."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_model import logits
from random_layers import names_of, randomize_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from qlora_ext import LoraConfig, LoraLinear, add_adapter, load_adapter, quantize_model, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODELS = {
    "tied-head": lambda: LlamaForCausalLM(tiny_config()).eval(),
    "head": lambda: LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval(),
    "classification-head": lambda: LlamaForSequenceClassification(tiny_config(pad_token_id=0)).eval(),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 4},
    "list": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    "regex": {"r": 4, "target_modules": r".*\.layers\.1\..*(q|down)_proj"},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["v_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 7},
        "alpha_pattern": {r"self_attn\.(q|v)_proj": 5},
        "use_rslora": True,
        "lora_dropout": 0.1,
    },
}
by_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
by_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def pefts_adapter(base: nn.Module, **fields: Any) -> peft.PeftModel:
    fields = {"target_modules": "all-linear", "lora_alpha": 16, **fields}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def our_adapter(base: nn.Module, **fields: Any) -> nn.Module:
    model = copy.deepcopy(base)
    add_adapter(model, LoraConfig(**fields))
    randomize_adapters(model)
    return model


def contents(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {key: (tensor.dtype, tensor.shape) for key, tensor in load_file(folder / WEIGHTS).items()}


@by_config
@by_model
def test_peft_loads_ours(make_model: Callable[[], nn.Module], fields: dict[str, Any], tmp_path: Path) -> None:
    base = make_model()
    ours = our_adapter(base, **fields)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert names_of(theirs.base_model.model, peft.tuners.lora.Linear) == names_of(ours, LoraLinear)
    assert (logits(ours) - logits(base)).abs().max() > 1e-3
    torch.testing.assert_close(logits(theirs), logits(ours))


@by_config
@by_model
def test_pefts_loads_here(make_model: Callable[[], nn.Module], fields: dict[str, Any], tmp_path: Path) -> None:
    base = make_model()
    theirs = pefts_adapter(base, **fields)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    assert names_of(ours, LoraLinear) == names_of(theirs.base_model.model, peft.tuners.lora.Linear)
    assert (logits(ours) - logits(base)).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs))


@by_config
def test_files_hold_what_pefts_hold(fields: dict[str, Any], tmp_path: Path) -> None:
    base = MODELS["tied-head"]()
    pefts_adapter(base, task_type="CAUSAL_LM", **fields).save_pretrained(tmp_path / "theirs")
    save_adapter(our_adapter(base, **fields), tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    with safe_open(tmp_path / "ours" / WEIGHTS, "pt") as ours, safe_open(tmp_path / "theirs" / WEIGHTS, "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    config, pefts_config = (json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs"))
    for each in (config, pefts_config):  # PEFT shuffles a list, and spells "all-linear" out
        each["target_modules"] = each["target_modules"] if isinstance(each["target_modules"], str) else "a list"
    assert config.items() <= (pefts_config | {"base_model_name_or_path": None}).items()


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "model.layers.0.self_attn.k_proj", "v_proj"]},
        {"exclude_modules": ["layers.0.self_attn.q_proj", "lm_head"]},
        {"exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "c_attn"]},  # a list for many kinds of models
    ],
    ids=str,
)
def test_pefts_choice_of_layers_survives_loading_and_saving(fields: dict[str, Any], tmp_path: Path) -> None:
    base = MODELS["head"]()
    theirs = pefts_adapter(base, **({"target_modules": ["q_proj", "up_proj"]} | fields))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    layers = names_of(theirs.base_model.model, peft.tuners.lora.Linear)
    assert names_of(again.base_model.model, peft.tuners.lora.Linear) == layers
    torch.testing.assert_close(logits(again), logits(theirs))


@pytest.mark.parametrize("missing", [["lora_alpha"], ["r", "lora_alpha"]], ids=str)
@pytest.mark.parametrize("null", [True, False], ids=["null", "missing"])
def test_what_a_config_leaves_out_is_as_in_peft(missing: list[str], null: bool, tmp_path: Path) -> None:
    base = MODELS["head"]()
    defaults = {key: getattr(peft.LoraConfig(), key) for key in missing}
    theirs = pefts_adapter(base, target_modules=["q_proj"], **({"r": 4} | defaults))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    kept = {key: value for key, value in config.items() if key not in missing}
    (tmp_path / CONFIG).write_text(json.dumps(kept | (dict.fromkeys(missing) if null else {})))
    load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base), logits(theirs))


class Ambiguous(nn.Module):
    """MultiheadAttention and the head share last parts with layers that get an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"out": nn.Linear(8, 8), "out_proj": nn.Linear(8, 8)})
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(8, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_all_linear_is_saved_as_names_that_mean_these_layers_alone(tmp_path: Path) -> None:
    model = Ambiguous()
    add_adapter(model, LoraConfig())
    assert names_of(model, LoraLinear) == {"block.out", "block.out_proj"}
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Ambiguous(), str(tmp_path))
    assert names_of(theirs.base_model.model, peft.tuners.lora.Linear) == {"block.out", "block.out_proj"}


class Siblings(nn.Module):
    """Modules that PEFT has no adapter for, or another kind of, are called as the linear layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({"proj": nn.Sequential(nn.LayerNorm(8)), "fc": nn.Conv3d(8, 8, 1)})
        self.text = nn.ModuleDict({"proj": nn.Linear(8, 8), "fc": nn.Linear(8, 8)})
        self.fc = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        ("all-linear", r"fc|text\.fc|text\.proj"),
        (["proj", "text.fc"], ["text.fc", "text.proj"]),
        (["proj", "fc"], r"fc|text\.fc|text\.proj"),
        (r"(.*\.)?proj", ["text.proj"]),
    ],
    ids=str,
)
def test_targets_that_mean_other_modules_too_are_saved_as_those_that_do_not(
    targets: str | list[str], saved: str | list[str], tmp_path: Path
) -> None:
    model = Siblings()
    add_adapter(model, LoraConfig(target_modules=targets))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == saved
    theirs = peft.PeftModel.from_pretrained(Siblings(), str(tmp_path))
    assert names_of(theirs.base_model.model, peft.tuners.lora.Linear) == names_of(model, LoraLinear)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_pefts_other_kinds_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    base = MODELS["head"]()
    pefts_adapter(base, target_modules=["q_proj"], **fields).save_pretrained(tmp_path)
    before = repr(base)
    with pytest.raises(ValueError, match=f"{CONFIG}.*{next(iter(fields))}"):
        load_adapter(base, tmp_path)
    assert repr(base) == before


def test_pefts_output_head_comes_with_its_weight(tmp_path: Path) -> None:
    base = MODELS["head"]()
    model = pefts_adapter(base, r=2, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model))
    half = copy.deepcopy(base).bfloat16()  # what the file has in float32 is compared as it is rounded here
    for same in (half, quantize_model(copy.deepcopy(base), skip=()), quantize_model(copy.deepcopy(half), skip=())):
        load_adapter(same, tmp_path)
    for other in (base, quantize_model(copy.deepcopy(base), skip=())):
        with torch.no_grad():
            other.lm_head.weight[0, 0] += 1
        with pytest.raises(ValueError, match=r"lm_head.base_layer.weight: expected what the model has in this place"):
            load_adapter(other, tmp_path)


def test_pefts_output_head_comes_with_its_bias(tmp_path: Path) -> None:
    def build() -> PhiForCausalLM:
        torch.manual_seed(0)
        return PhiForCausalLM(PhiConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1))

    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.base_layer.bias" in load_file(tmp_path / WEIGHTS)
    load_adapter(build(), tmp_path)
    other = build()
    other.lm_head.bias.data += 1
    with pytest.raises(ValueError, match=r"lm_head.base_layer.bias: expected what the model has in this place"):
        load_adapter(other, tmp_path)


def test_peft_calls_a_model_of_sounds_with_ours(tmp_path: Path) -> None:
    """PEFT's own wrapper of SEQ_2_SEQ_LM would give it input_ids."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    sizes = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100, "max_source_positions": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = our_adapter(base := WhisperForConditionalGeneration(WhisperConfig(**heads, **sizes, **tokens)).eval(), r=2)
    save_adapter(model, tmp_path)
    inputs = {"input_features": torch.randn(1, 80, 16), "decoder_input_ids": torch.tensor([[1, 5]])}
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits)


def test_no_adapter_is_loaded_into_layers_without_values(tmp_path: Path) -> None:
    model = nn.ModuleDict({"text": nn.Linear(64, 64), "vision": nn.Linear(64, 64)})
    add_adapter(model, LoraConfig(r=2, target_modules=["text"]))
    save_adapter(model, tmp_path)
    with torch.device("meta"):
        empty = nn.Linear(64, 64)
    load_adapter(nn.ModuleDict({"text": nn.Linear(64, 64), "vision": empty}), tmp_path)
    with pytest.raises(ValueError, match=r"load_adapter: model: text: expected a layer with values, got one on meta"):
        load_adapter(nn.ModuleDict({"text": empty, "vision": nn.Linear(64, 64)}), tmp_path)


def test_a_bias_for_a_layer_without_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    add_adapter(model, LoraConfig(r=2))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.0.base_layer.bias": torch.zeros(64)}, path)
    with pytest.raises(ValueError, match=r"0\.base_layer\.bias: expected what the model has"):
        load_adapter(model, tmp_path)
