"""What transformers' models ask their configs: whether layers are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn

from qlora_ext.dense_linear import of_transformers

_MARK = "qlora_ext"  # transformers asks only if there is an _is_quantized, and saves none; True is another quantizer's
_marked: WeakSet[nn.Module] = WeakSet()  # the models, as several may share a config


def mark_configs(model: nn.Module) -> None:
    """Set what transformers' own quantizers set: else Jamba multiplies by dt_proj's bytes, and flash attention looks in
    vain for an nn.Linear, whose dtype it wants, and then takes the config's."""
    for module, config in _with_configs(model):
        _marked.add(module)
        config._is_quantized = getattr(config, "_is_quantized", _MARK)
        config.dtype = config.dtype or next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def unmark_configs(model: nn.Module) -> None:
    """Undo it for a model of which nothing is in 4 bits any more, but where another one has the same config."""
    for module, config in _with_configs(model):
        _marked.discard(module)
        shared = any(getattr(other, "config", None) is config for other in _marked)
        if getattr(config, "_is_quantized", None) == _MARK and not shared:
            del config._is_quantized


def _with_configs(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The models of transformers in it, and their configs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if of_transformers(type(module), "PreTrainedModel") and of_transformers(type(config), "PreTrainedConfig"):
            yield module, config
