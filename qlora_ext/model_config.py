"""What transformers' models ask their configs: whether layers are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from qlora_ext.dense_linear import of_transformers

_COUNTED = "_in_count_of_config"


def mark_configs(model: nn.Module) -> None:
    """Set what transformers' own quantizers set: else Jamba multiplies by dt_proj's bytes, and flash attention looks in
    vain for an nn.Linear, whose dtype it wants, and then takes the config's.

    transformers asks only if there is an _is_quantized, and saves none. Here it is the number of models with this
    config that are quantized, which may be several; True is another quantizer's.
    """
    for module, config in _with_configs(model):
        count = getattr(config, "_is_quantized", 0)
        if count is not True and not vars(module).get(_COUNTED):
            setattr(module, _COUNTED, True)
            config._is_quantized = count + 1
        config.dtype = config.dtype or next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def unmark_configs(model: nn.Module) -> None:
    """Undo it for a model of which nothing is in 4 bits any more."""
    for module, config in _with_configs(model):
        if vars(module).pop(_COUNTED, False):
            config._is_quantized -= 1
            if config._is_quantized == 0:
                del config._is_quantized


def _with_configs(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The models of transformers in it, and their configs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if of_transformers(type(module), "PreTrainedModel") and of_transformers(type(config), "PreTrainedConfig"):
            yield module, config
