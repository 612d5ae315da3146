"""Checkpoints that transformers rearranges or decodes as it loads them: mixtures, renamed tensors, MXFP4 and FP8."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_memory import measure
from safetensors.torch import load_file, save_file
from tiny_model import assert_same_model, load
from tiny_model import one_thread as one_thread
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV3Config,
    FineGrainedFP8Config,
    GPTNeoXConfig,
    GptOssConfig,
    MixtralConfig,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import qlora_ext
from qlora_ext.experts import Experts4bit
from qlora_ext.finetune.load import load_model, open_checkpoint
from qlora_ext.model_layers import output_head

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
LINEAR = {f"linear_{kind}_head_dim": 16 for kind in ("key", "value")} | {"linear_num_key_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **HEADS, **EXPERTS, num_experts=4),
    "deepseek_v3": DeepseekV3Config(  # the router's weight and bias stay in fp32
        **SIZES, **EXPERTS, **LATENT, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "qwen3_5": Qwen3_5TextConfig(
        **SIZES, **HEADS, **LINEAR, linear_num_value_heads=2, layer_types=["linear_attention", "full_attention"]
    ),
}
QUANTIZE: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}


def save(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Save a new model and return it; its buffers and one-dimensional parameters are no zeros or ones either."""
    torch.manual_seed(0)
    model = Auto.from_config(copy.deepcopy(config), dtype=dtype).eval()
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **tensors: Tensor | None) -> None:
    path = folder / "model.safetensors"
    edited = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, path, {"format": "pt"})


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
    part, dense = f"{layer}mlp__experts__2__down_proj__weight", f"{layer}self_attn__q_proj__weight"
    stored = load_file(tmp_path / "model.safetensors")
    weight, query = (stored[name.replace("__", ".")] for name in (part, dense))
    fused = r"tensor 'model\.layers\.1\.mlp\.experts\.down_proj'"

    for quantize in (None, QUANTIZE):
        edit(tmp_path, **{part: None})
        with pytest.raises(ValueError, match=rf"{fused}: expected shape \(4, 128, 128\), got \(3, 128, 128\)"):
            load(tmp_path, quantize=quantize)
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
        with pytest.raises(
            ValueError, match=rf"{fused}: .*'model.layers.1.mlp.experts.down_proj' is stored as a whole"
        ):
            load(tmp_path, quantize=quantize)
        edit(tmp_path, **dict.fromkeys(whole))
        load(tmp_path, quantize=quantize)


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


def fp8(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections in blocks of 128 x 128 with a scale each, as DeepSeek-V3 is published."""
    encoded = dict(stored)
    for name in [name for name in stored if name.endswith("proj.weight")]:
        rows, columns = stored[name].shape
        blocks = stored[name].float().view(rows // 128, 128, columns // 128, 128)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        encoded[name] = (blocks / scales).view(rows, columns).to(torch.float8_e4m3fn)
        encoded[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
    return encoded


def mxfp4(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as any bytes, 16 with two codes each and one exponent for 32 weights, as gpt-oss is published."""
    encoded = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = encoded.pop(name).shape
        encoded[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        encoded[f"{name}_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    return encoded


FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPT_OSS = GptOssConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
DECODED: dict[str, tuple[Any, ...]] = {
    "mxfp4": (GPT_OSS, mxfp4, {"quant_method": "mxfp4"}, Mxfp4Config),
    "fp8": (Qwen3Config(**SIZES, **HEADS), fp8, FP8, FineGrainedFP8Config),
    "fp8 experts": (CONFIGS["qwen3_moe"], fp8, FP8, FineGrainedFP8Config),
}


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))


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
        ValueError, match=r"tensor 'model\.layers\.0\.mlp.*cannot be made of .*weight_scale_inv, got [03]"
    ):
        load(tmp_path)


def test_a_format_is_read_or_told(tmp_path: Path) -> None:
    expected = save(tmp_path, CONFIGS["qwen3_moe"])
    describe(tmp_path, {})
    assert_same_model(load(tmp_path), expected)
    describe(tmp_path, {"quant_method": "fp8", "weight_block_size": 128})
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a quantization_config that transformers can read"):
        load(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("published", "copies"), [(False, 3), (True, 5)], ids=["experts one by one", "mxfp4"])
def test_loading_a_mixture_never_holds_it_dense(published: bool, copies: int, tmp_path: Path) -> None:
    """But what the model takes, and what one weight of all experts is made of, in bf16."""
    sizes = {**SIZES, "hidden_size": 512, "num_hidden_layers": 10}
    if published:
        config = GptOssConfig(**{**HEADS, **sizes, "intermediate_size": 256}, num_local_experts=32)
        save(tmp_path, config, torch.bfloat16)
        save_file(mxfp4(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
        describe(tmp_path, {"quant_method": "mxfp4"})
    else:
        config = Qwen3MoeConfig(**{**HEADS, **EXPERTS, **sizes, "moe_intermediate_size": 256, "num_experts": 32})
        save(tmp_path, config, torch.bfloat16)
    growth, model = measure(tmp_path)
    largest = 32 * 512 * 512 * 2
    assert model < 80 * 2**20, "the model under test is quantized: 260 MB in bf16"
    assert growth <= model + copies * largest + 32 * 2**20
