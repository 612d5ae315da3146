"""The same causal language model under each method: ours, PEFT on bitsandbytes' 4-bit layers, PEFT on dense ones."""

from __future__ import annotations

from collections.abc import Callable

import peft
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

import qlora_ext

R, LORA_ALPHA = 8, 16


def ours(model: nn.Module, lora_dropout: float) -> nn.Module:
    """QLoRA by qlora_ext."""
    qlora_ext.quantize_model(model)
    qlora_ext.add_adapter(model, qlora_ext.LoraConfig(r=R, lora_alpha=LORA_ALPHA, lora_dropout=lora_dropout))
    return model


def bitsandbytes_4bit(model: nn.Module) -> nn.Module:
    """The linear layers as transformers' BitsAndBytesConfig (4-bit, nf4, double_quant) makes them."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        layer = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=module.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        layer.bias = module.bias
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True  # what PEFT looks for
    return model


def peft_bitsandbytes(model: nn.Module, lora_dropout: float) -> nn.Module:
    """QLoRA by PEFT and bitsandbytes."""
    return peft_lora(bitsandbytes_4bit(model), lora_dropout)


def peft_lora(model: nn.Module, lora_dropout: float) -> nn.Module:
    """LoRA by PEFT on the model's own weights."""
    model.requires_grad_(False)
    options = {"r": R, "lora_alpha": LORA_ALPHA, "lora_dropout": lora_dropout, "target_modules": "all-linear"}
    return peft.get_peft_model(model, peft.LoraConfig(**options, task_type="CAUSAL_LM"))


METHODS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "qlora_ext QLoRA": ours,
    "PEFT + bitsandbytes QLoRA": peft_bitsandbytes,
    "PEFT LoRA on the dense base": peft_lora,
}
