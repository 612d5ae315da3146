"""What transformers' models ask their configs: whether layers are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from qlora_ext.dense_linear import of_transformers
from qlora_ext.linear import Linear4bit


class Token:
    """Stands for a model in the mark of its config, and is copied with both."""


class Mark(NamedTuple):
    """The value of a config's _is_quantized, of which transformers asks only if there is any, and which it never saves.

    Models that share a config share this, too. A copy of the config, for the one that is quantized alone, would part it
    from those that it is part of: they share settings on purpose.
    """

    models: frozenset[Token]  # in 4 bits
    dtype: torch.dtype | None  # that the config had


def mark_configs(model: nn.Module) -> None:
    """Set what transformers' own quantizers set: else Jamba multiplies by dt_proj's bytes, and flash attention looks in
    vain for an nn.Linear, whose dtype it wants, and then takes the config's."""
    for module, config in _with_configs(model):
        mark = getattr(config, "_is_quantized", Mark(frozenset(), config.dtype))
        if isinstance(mark, Mark):  # else a quantizer of transformers has been there
            token = vars(module).setdefault("_token_in_config", Token())
            config._is_quantized = mark._replace(models=mark.models | {token})
        config.dtype = config.dtype or next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def unmark_configs(model: nn.Module) -> None:
    """Undo it where nothing is in 4 bits any more, nor in another model with the same config."""
    for module, config in _with_configs(model):
        mark = getattr(config, "_is_quantized", None)
        if isinstance(mark, Mark) and not any(isinstance(part, Linear4bit) for part in module.modules()):
            left = mark.models - {vars(module).get("_token_in_config")}
            config._is_quantized = mark._replace(models=left)
            if not left:
                del config._is_quantized
                config.dtype = mark.dtype


def _with_configs(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The models of transformers in it, and their configs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if of_transformers(type(module), "PreTrainedModel") and of_transformers(type(config), "PreTrainedConfig"):
            yield module, config
