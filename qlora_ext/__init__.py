"""QLoRA for PyTorch: exact NF4 weights, double quantization, LoRA adapters, a paged optimizer. See README.md."""

from typing import TYPE_CHECKING, Any

from qlora_ext._ops import codebook
from qlora_ext.adapters import (
    add_adapter,
    delete_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from qlora_ext.flops import register_flops
from qlora_ext.functional import dequantize_4bit, linear_4bit, quantize_4bit
from qlora_ext.linear import Linear4bit
from qlora_ext.lora import LoraConfig, LoraLinear
from qlora_ext.optim import PagedAdamW
from qlora_ext.quant_state import QuantState
from qlora_ext.quantize import quantize_model

if TYPE_CHECKING:
    from qlora_ext.interop.transformers import NF4Config

__all__ = [
    "Linear4bit",
    "LoraConfig",
    "LoraLinear",
    "NF4Config",
    "PagedAdamW",
    "QuantState",
    "add_adapter",
    "codebook",
    "delete_adapter",
    "dequantize_4bit",
    "linear_4bit",
    "load_adapter",
    "merge_adapter",
    "quantize_4bit",
    "quantize_model",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]

register_flops()


def __getattr__(name: str) -> Any:
    """NF4Config, whose module imports transformers: only who asks for it waits for that."""
    if name == "NF4Config":
        from qlora_ext.interop.transformers import NF4Config

        return NF4Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
