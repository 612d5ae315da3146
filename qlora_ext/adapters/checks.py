"""What has to hold of a model before its adapters are changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from qlora_ext.layer_hooks import has_other_forward
from qlora_ext.model_layers import adapter_names, lora_layers


def check_has_adapter(op: str, model: nn.Module, name: str) -> None:
    """Raise ValueError unless the model has an adapter of this name."""
    if name not in adapter_names(model):
        raise ValueError(f"{op}: name: expected one of {adapter_names(model)}, got {name!r}")


def check_not_merged(op: str, model: nn.Module) -> None:
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError(f"{op}: model: expected unmerged adapters (call unmerge_adapter first), got merged ones")


def check_not_offloaded(op: str, model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if parameters of a layer are kept elsewhere, and accelerate's hooks on it, or on a module that
    it is in, know which."""
    hooked = {id(part) for module in model.modules() if has_other_forward(module) for part in module.modules()}
    for name, layer in layers:
        if any(id(part) in hooked and any(t.is_meta for t in part.parameters(False)) for part in layer.modules()):
            expected = "a layer in memory (add, delete and merge adapters before accelerate's dispatch or offload)"
            raise ValueError(f"{op}: model: {name}: expected {expected}, got one on meta with accelerate's hook")
