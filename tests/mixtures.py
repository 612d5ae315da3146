"""Tiny mixtures of transformers, and adapters on their fused experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from qlora_ext import LoraConfig, add_adapter, merge_adapter, quantize_model, set_adapter
from qlora_ext.experts import Experts4bit
from qlora_ext.lora.experts import LoraExperts

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
MOE = {"moe_intermediate_size": 32, "intermediate_size": 128, "num_experts_per_tok": 2, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=128, num_key_value_heads=2, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(**SIZES, **MOE, head_dim=16, num_experts=4),
    "olmoe": OlmoeConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
    "deepseek": DeepseekV3Config(
        **SIZES,
        **{**MOE, "num_key_value_heads": 4},
        **LATENT,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt_oss": GptOssConfig(  # [experts, in, out], with biases
        **SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
}
TOKENS = torch.arange(40).view(2, 20)


def mixture(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = Auto.from_config(copy.deepcopy(CONFIGS[name])).eval()
    for module in model.modules():  # gpt-oss's biases and DeepSeek's are zeros, or nothing, when new
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.1) if parameter.dim() != 1 else None
    return model


def experts_of(model: nn.Module) -> dict[str, Experts4bit]:
    """By the names of the weights whose place they take."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts4bit)}
    return {name.replace("quantized_", "").removesuffix("_"): module for name, module in found.items()}


BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(name: str, targets: list[str] = BOTH, **options: Any) -> PreTrainedModel:
    """A mixture in 4 bits with an adapter of random values on its experts."""
    model = quantize_model(mixture(name))
    add_adapter(model, LoraConfig(**{"r": 4, "target_modules": [], "target_parameters": targets} | options))
    torch.manual_seed(1)
    for layer in lora_experts(model).values():
        nn.init.normal_(layer.lora_B["default"], std=0.1)
    return model


def lora_experts(model: nn.Module) -> dict[str, LoraExperts]:
    """By the names of the weights."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraExperts)}
    return {n.replace("quantized_", "").removesuffix("_.stack"): m for n, m in found.items()}


def decoded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its base's weights in 32 bits, without adapters."""
    plain = copy.deepcopy(model)
    set_adapter(plain, None)
    merge_adapter(plain, dequantize=True)
    return plain
