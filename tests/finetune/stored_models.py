"""Small models saved as transformers saves them, under other names than their own, and in formats of published ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV3Config,
    GPTNeoXConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

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
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=12),  # the 11th before the 3rd in a file
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


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings))


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
