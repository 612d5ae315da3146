"""What a LoraConfig's targets mean in a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from qlora_ext.layer_names import is_named
from qlora_ext.lora.config import LoraConfig
from qlora_ext.lora.names import is_pattern_of
from qlora_ext.model_layers import closed_modules, expert_layers, linear_layers, named_layers


def targeted(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the layers, and weights of fused experts, that the config's targets mean in this model.

    Raises:
        ValueError: a target matches none; a key of rank_pattern or alpha_pattern matches none of them.
    """
    wanted = config.target_modules
    linear = named_layers(model, wanted)
    for target in [[name] for name in wanted] if isinstance(wanted, list) else [wanted]:
        if not linear or (isinstance(target, list) and not any(is_named(name, target) for name in linear)):
            expected = f"names of linear layers (here, by their last parts: {_last_parts(linear_layers(model))})"
            if closed := closed_modules(model):
                expected += f", not within {', '.join(sorted(set(closed.values())))}"
            if target == "all-linear":
                expected = f"an nn.Linear that is no output head and has nn.Linear's forward, or {expected}"
            raise ValueError(f"add_adapter: target_modules: expected {expected}, got {target!r}")
    experts = expert_layers(model)
    for target in config.target_parameters:
        if not any(is_named(name, [target]) for name in experts):
            expected = f"names of fused experts' weights in 4 bits (here, by their last parts: {_last_parts(experts)})"
            raise ValueError(f"add_adapter: target_parameters: expected {expected}, got {target!r}")
    names = linear + [name for name in experts if is_named(name, config.target_parameters)]
    for what in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, what):
            if not any(is_pattern_of(key, name) for name in names):
                raise ValueError(f"add_adapter: {what}: expected names of layers with the adapter, got {key!r}")
    return names


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names})) or "none"
