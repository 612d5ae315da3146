"""Checkpoints in MXFP4 and FP8, the formats in which some models are published."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_memory import measure
from safetensors.torch import load_file, save_file
from stored_models import CONFIGS, HEADS, QUANTIZE, SIZES, describe, edit, fp8, mxfp4, save
from tiny_model import assert_same_model, load, save_tiny_model
from tiny_model import one_thread as one_thread
from transformers import AutoModelForCausalLM as Auto
from transformers import FineGrainedFP8Config, GptOssConfig, Mxfp4Config, Qwen3Config

import qlora_ext
from qlora_ext.finetune.model_folder import ModelFolder
from qlora_ext.model_layers import output_head

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPT_OSS = GptOssConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
DECODED: dict[str, tuple[Any, ...]] = {
    "mxfp4": (GPT_OSS, mxfp4, {"quant_method": "mxfp4"}, Mxfp4Config),
    "fp8": (Qwen3Config(**SIZES, **HEADS), fp8, FP8, FineGrainedFP8Config),
    "fp8 experts": (CONFIGS["qwen3_moe"], fp8, FP8, FineGrainedFP8Config),
}


def publish(folder: Path, case: str) -> None:
    config, encode, quantization, _ = DECODED[case]
    save(folder, config, torch.bfloat16)
    save_file(encode(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    describe(folder, quantization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", DECODED)
def test_published_formats_are_decoded(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    publish(tmp_path, case)
    options = DECODED[case][-1]
    got = load(tmp_path, dtype)
    expected = Auto.from_pretrained(tmp_path, dtype=dtype, quantization_config=options(dequantize=True)).eval()
    assert_same_model(got, expected)
    qlora_ext.quantize_model(got, **QUANTIZE, skip=output_head(got))
    assert_same_model(load(tmp_path, dtype, QUANTIZE), got)

    load(tmp_path, dtype).save_pretrained(tmp_path / "tuned")
    assert "quantization_config" not in json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert_same_model(load(tmp_path / "tuned", dtype), expected)


@pytest.mark.parametrize("case", ["fp8", "fp8 experts"])
def test_codes_without_their_scale_are_no_values(case: str, tmp_path: Path) -> None:
    publish(tmp_path, case)
    stored = load_file(tmp_path / "model.safetensors")
    name = next(name for name in stored if "mlp" in name and name.endswith("_scale_inv"))
    edit(tmp_path, **{name.replace(".", "__"): None})
    with pytest.raises(
        ValueError, match=r"tensor 'model\.layers\.0\.mlp.*cannot be made of .*scale for each .* got [03] for [14]"
    ):
        load(tmp_path)


def test_every_kind_of_fp8_is_codes(tmp_path: Path) -> None:
    publish(tmp_path, "fp8")
    name = "model.layers.0.mlp.up_proj.weight"
    codes = load_file(tmp_path / "model.safetensors")[name].to(torch.float8_e5m2)
    edit(tmp_path, **{name.replace(".", "__"): codes, f"{name}_scale_inv".replace(".", "__"): None})
    with pytest.raises(ValueError, match="expected a scale for each tensor in FP8, got 0 for 1"):
        load(tmp_path)


def test_a_format_is_read_or_told(tmp_path: Path) -> None:
    expected = save(tmp_path, CONFIGS["qwen3_moe"])
    describe(tmp_path, {})
    assert_same_model(load(tmp_path), expected)
    text = CONFIGS["qwen3_5"].to_dict() | {"quantization_config": {"quant_method": "awq"}}
    part = json.dumps({"model_type": "qwen3_5", "text_config": text})
    (tmp_path / "config.json").write_text(part)
    with pytest.raises(ValueError, match=f"{tmp_path}: expected the original model, got one quantized by awq"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(part.replace("awq", "fp8"))
    assert ModelFolder(tmp_path).decoder() is not None
    save(tmp_path, CONFIGS["qwen3_moe"])
    describe(tmp_path, {"quant_method": "fp8", "weight_block_size": 128})
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a quantization_config that transformers can read"):
        load(tmp_path)


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "fp8"])
def test_parts_that_the_model_is_without_are_left_out(
    scales: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """DeepSeek-V3 is published with a layer that predicts a second token; its class says so."""
    save(tmp_path, CONFIGS["deepseek_v3"])
    expected = load(tmp_path)
    layer = "model__layers__61__mlp__experts__0__down_proj__weight"
    edit(tmp_path, **{layer: torch.ones(128, 128)} | ({f"{layer}_scale_inv": torch.ones(1, 1)} if scales else {}))
    if scales:
        describe(tmp_path, FP8)
    assert_same_model(load(tmp_path), expected)
    assert not [each for each in recwarn if "left out" in str(each.message)]


def test_a_buffer_that_no_file_holds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    saved = save(tmp_path, CONFIGS["deepseek_v3"])
    edit(tmp_path, **{name.replace(".", "__"): None})
    with pytest.raises(ValueError, match=f"{tmp_path}: missing tensor '{name}'"):
        load(tmp_path)
    monkeypatch.setattr(type(saved), "_keys_to_ignore_on_load_missing", ["e_score_correction_bias"])
    assert not load(tmp_path).get_buffer(name).any(), "a class may do without it, as that of A.X-K1"


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a causal language model, got t5$"):
        load(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_a_published_mixture_never_holds_it_dense(tmp_path: Path) -> None:
    """But what the model takes, and what one weight of all experts is decoded in."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 10}
    save(tmp_path, GptOssConfig(**HEADS, **sizes, num_local_experts=32), torch.bfloat16)
    save_file(mxfp4(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    describe(tmp_path, {"quant_method": "mxfp4"})
    growth, model = measure(tmp_path)
    largest = 32 * 512 * 512 * 2
    assert model < 80 * 2**20, "the model under test is quantized: 260 MB in bf16"
    assert growth <= model + 5 * largest + 32 * 2**20


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_numbers_of_another_kind_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, Qwen3Config(**SIZES, **HEADS), torch.bfloat16)
    name = "model.norm.weight"
    edit(tmp_path, **{name.replace(".", "__"): load_file(tmp_path / "model.safetensors")[name].to(dtype)})
    with pytest.raises(ValueError, match=rf"tensor 'model\.norm\.weight': expected a torch\.bfloat16, got {dtype}"):
        load(tmp_path, torch.bfloat16)
