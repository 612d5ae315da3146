"""LoRA adapters on one layer."""

from qlora_ext.lora.config import LoraConfig
from qlora_ext.lora.linear import LoraLinear

__all__ = ["LoraConfig", "LoraLinear"]
