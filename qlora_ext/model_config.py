"""What transformers' models ask their configs: whether layers are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from qlora_ext.dense_linear import of_transformers
from qlora_ext.linear import Linear4bit

_MARK = "qlora_ext"  # transformers asks only if there is an _is_quantized, and saves none


def mark_configs(model: nn.Module) -> None:
    """Set what transformers' own quantizers set: else Jamba multiplies by dt_proj's bytes, and flash attention looks in
    vain for an nn.Linear, whose dtype it wants, and then takes the config's."""
    for module, config in _with_configs(model):
        config._is_quantized = getattr(config, "_is_quantized", _MARK)
        config.dtype = config.dtype or next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def unmark_configs(model: nn.Module) -> None:
    """Take the mark off again where nothing is in 4 bits any more."""
    for module, config in _with_configs(model):
        in_bits = any(isinstance(part, Linear4bit) for part in module.modules())
        if getattr(config, "_is_quantized", None) == _MARK and not in_bits:
            del config._is_quantized


def _with_configs(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The models of transformers in it, and their configs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if of_transformers(type(module), "PreTrainedModel") and of_transformers(type(config), "PreTrainedConfig"):
            yield module, config
