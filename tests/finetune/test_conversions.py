"""Checkpoints that transformers rearranges as it loads them: the experts of mixtures, tensors of other names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from loading_memory import measure
from safetensors.torch import load_file, save_file
from stored_models import CONFIGS, EXPERTS, HEADS, QUANTIZE, SIZES, edit, save
from tiny_model import assert_same_model, load
from tiny_model import one_thread as one_thread
from transformers import AutoModelForCausalLM as Auto
from transformers import HrmTextConfig, Qwen3MoeConfig

import qlora_ext
from qlora_ext.experts import Experts4bit
from qlora_ext.finetune.load import load_model, open_checkpoint
from qlora_ext.model_layers import output_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_loads_and_saves_as_transformers_does(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = save(tmp_path, CONFIGS[name])
    if name == "qwen3_5":  # as a model of text and images, whose part it is, has it
        stored = load_file(tmp_path / "model.safetensors")
        renamed = {key.replace("model.", "model.language_model.", 1): value for key, value in stored.items()}
        save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() != saved.state_dict().keys(), "the case needs an architecture whose file has other names"
    got, expected = load(tmp_path, dtype), Auto.from_pretrained(tmp_path, dtype=dtype).eval()
    assert_same_model(got, expected)
    got.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    for key, tensor in stored.items():
        torch.testing.assert_close(again[key], tensor.to(again[key].dtype), rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_the_models_own_names_are_read_and_saved_so(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, CONFIGS[name])
    model.save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert_same_model(load(tmp_path), model)
    if name == "qwen3_5":  # no prefix was there to take away
        load(tmp_path).save_pretrained(tmp_path / "again")
        assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()


def test_later_changes_of_the_file_do_not_reach_what_was_split(tmp_path: Path) -> None:
    expected = save(tmp_path, HrmTextConfig(**SIZES, num_key_value_heads=2, head_dim=64))
    model, path = load(tmp_path), tmp_path / "model.safetensors"
    assert any("gate_up_proj" in name for name in load_file(path)), "the case needs a tensor to be split"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert_same_model(model, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_is_quantized_from_what_is_stored(name: str, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[name])
    expected = load(tmp_path)
    qlora_ext.quantize_model(expected, **QUANTIZE, skip=output_head(expected))
    got = load(tmp_path, quantize={})  # the same: its defaults
    assert_same_model(got, expected)
    if "num_experts_per_tok" in vars(CONFIGS[name]):
        assert isinstance(got.model.layers[1].mlp.experts.down_proj, Experts4bit)
    eager = load_model(
        open_checkpoint(str(tmp_path)), dtype=torch.float32, device=torch.device("cpu"), attention="eager"
    )
    assert eager.config._attn_implementation == "eager"


def test_what_does_not_make_a_whole_is_named(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["qwen3_moe"])
    layer = "model__layers__1__"
    last, part = (f"{layer}mlp__experts__{expert}__down_proj__weight" for expert in (3, 2))
    dense = f"{layer}self_attn__q_proj__weight"
    stored = load_file(tmp_path / "model.safetensors")
    weight, query = (stored[name.replace("__", ".")] for name in (part, dense))
    fused = r"tensor 'model\.layers\.1\.mlp\.experts\.down_proj'"

    for quantize in (None, QUANTIZE):
        edit(tmp_path, **{part: None})
        with pytest.raises(
            ValueError, match=rf"{fused}: .*expected all of mlp.*down_proj.weight from 0 on, got \[0, 1, 3"
        ):
            load(tmp_path, quantize=quantize)
        edit(tmp_path, **{part: weight, last: None})
        with pytest.raises(ValueError, match=rf"{fused}: expected shape \(4, 128, 128\), got \(3, 128, 128\)"):
            load(tmp_path, quantize=quantize)
        edit(tmp_path, **{last: weight})
        edit(tmp_path, **{part: weight[:-1].clone()})
        made_of = r"'model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight' and 3 more"
        with pytest.raises(
            ValueError, match=rf"{tmp_path}: {fused}: cannot be made of {made_of} \(Runtime.*stack expects"
        ):
            load(tmp_path, quantize=quantize)
        edit(tmp_path, **{part: weight, dense: None})
        with pytest.raises(ValueError, match=r"missing tensor 'model\.layers\.1\.self_attn\.q_proj\.weight'"):
            load(tmp_path, quantize=quantize)
        edit(tmp_path, **{dense: query, f"{layer}extra": query.clone()})
        with pytest.raises(ValueError, match=r"unknown tensor 'model\.layers\.1\.extra' for Qwen3MoeForCausalLM"):
            load(tmp_path, quantize=quantize)
        whole = {f"{layer}mlp__experts__down_proj": torch.zeros(4, 128, 128)}
        edit(tmp_path, **{f"{layer}extra": None}, **whole)
        twice = r"expected it once, or in parts, got 'model.*\.0\.down_proj\.weight' and 'model.*experts\.down_proj'"
        with pytest.raises(ValueError, match=rf"{fused}: {twice}"):
            load(tmp_path, quantize=quantize)
        edit(tmp_path, **dict.fromkeys(whole), layers__1__self_attn__q_proj__weight=query.clone())
        with pytest.raises(
            ValueError, match=r"tensor '.*q_proj\.weight': expected it once, or in parts, got 'layers\.1"
        ):
            load(tmp_path, quantize=quantize)
        edit(tmp_path, layers__1__self_attn__q_proj__weight=None)
        load(tmp_path, quantize=quantize)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_a_mixture_never_holds_it_dense(tmp_path: Path) -> None:
    """But what the model takes, and what one weight of all experts is made of, in bf16."""
    sizes = {**SIZES, "hidden_size": 512, "num_hidden_layers": 10, "moe_intermediate_size": 256, "num_experts": 32}
    save(tmp_path, Qwen3MoeConfig(**{**HEADS, **EXPERTS, **sizes}), torch.bfloat16)
    growth, model = measure(tmp_path)
    largest = 32 * 512 * 512 * 2
    assert model < 80 * 2**20, "the model under test is quantized: 260 MB in bf16"
    assert growth <= model + 3 * largest + 32 * 2**20
