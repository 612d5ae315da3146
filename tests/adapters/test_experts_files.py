"""Adapters on fused experts in PEFT's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from mixtures import BOTH, TOKENS, adapted, decoded, mixture
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from random_layers import randomize_adapters
from reference import assert_same
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_ext import LoraConfig, add_adapter, load_adapter, merge_adapter, quantize_model, save_adapter

WEIGHTS = "adapter_model.safetensors"
TARGETS = [BOTH, BOTH[1:], BOTH[::-1]]
KINDS = ["mixtral", "qwen3", "gpt_oss"]


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_peft_reads_what_is_saved(name: str, targets: list[str], r: int, tmp_path: Path) -> None:
    patterns = {"alpha_pattern": {"down_proj": 32}, "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": r + 1}}
    model = adapted(name, targets, r=r, target_modules=["q_proj"], **patterns)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(decoded(model), tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)
    again = quantize_model(mixture(name))
    load_adapter(again, tmp_path)
    assert_same(again(TOKENS).logits, model(TOKENS).logits)
    save_adapter(again, tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["target_parameters"] == targets
    assert_same(
        load_file(tmp_path / "again/adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    )


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_what_peft_saves_is_read(name: str, targets: list[str], tmp_path: Path) -> None:
    model = quantize_model(mixture(name))
    options = {"target_modules": [], "target_parameters": targets, "rank_pattern": {"down_proj": 3}}
    config = PeftConfig(r=4, init_lora_weights=False, **options)
    theirs = get_peft_model(decoded_without_adapters(model), config)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits)


def decoded_without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    plain = copy.deepcopy(model)
    merge_adapter(plain, dequantize=True)
    return plain


def with_down_proj_alone() -> PreTrainedModel:
    """In 4 bits: most of the model's weights are not."""
    with pytest.warns(UserWarning, match="131,072 weights stay as they are"):
        return quantize_model(mixture("mixtral"), skip=["lm_head", "gate_up_proj"])


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_adapter(adapted("mixtral"), tmp_path)
    for model, got in ((mixture("mixtral"), "down_proj"), (with_down_proj_alone(), "gate_up_proj")):
        expected = rf"target_parameters: expected .* in 4 bits.*got model\.layers\.0\.mlp\.experts\.{got}"
        with pytest.raises(ValueError, match=expected):
            load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"gate_up_proj\.lora_B: expected shape \[64, 16\], got \[256, 16\]"):
        load_adapter(quantize_model(mixture("qwen3")), tmp_path)


def test_a_file_without_a_weights_tensors_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted("mixtral"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(
        {key: t for key, t in tensors.items() if "layers.1.mlp.experts.base_layer" not in key}, tmp_path / WEIGHTS
    )
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: expected tensors as for every layer"):
        load_adapter(quantize_model(mixture("mixtral")), tmp_path)


def test_order_is_that_of_the_parameters_however_they_were_quantized(tmp_path: Path) -> None:
    model = with_down_proj_alone()
    quantize_model(model)
    add_adapter(model, LoraConfig(r=4, target_modules=[], target_parameters=BOTH))
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(decoded(model), tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)


def test_experts_that_have_no_adapter_get_none_from_the_file(tmp_path: Path) -> None:
    left = "model.layers.0.mlp.experts"
    model = quantize_model(mixture("mixtral"), skip=["lm_head", left])
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["down_proj"]))
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    theirs = PeftModel.from_pretrained(decoded(model), tmp_path)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)


NAMES = ["down_proj", "gate_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "up_proj"]


@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        ("all-linear", NAMES),
        (["down_proj", "gate_proj"], ["down_proj", "gate_proj"]),
        (r".*\.(q_a_proj|down_proj)", r".*\.(q_a_proj|down_proj)"),
    ],
    ids=["all-linear", "names", "regex"],
)
def test_experts_are_no_modules_to_peft(targets: str | list[str], saved: str | list[str], tmp_path: Path) -> None:
    """DeepSeek's first layer is dense, with layers whose names are those of experts' weights elsewhere."""
    plain, model = mixture("deepseek"), quantize_model(mixture("deepseek"))
    for folder, each in ((tmp_path / "plain", plain), (tmp_path / "quantized", model)):
        add_adapter(each, LoraConfig(r=4, target_modules=targets))
        save_adapter(each, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == saved
