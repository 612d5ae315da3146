"""Adapters on a whole model: add, switch and delete them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

from torch import Tensor, nn

from qlora_ext.adapters.targets import targeted
from qlora_ext.experts import Stack4bit
from qlora_ext.layer_hooks import check_not_offloaded, is_hooked, of_accelerate
from qlora_ext.lora.config import LoraConfig
from qlora_ext.lora.experts import LoraExperts
from qlora_ext.lora.linear import LoraLinear
from qlora_ext.lora.names import check_name
from qlora_ext.model_layers import (
    adapter_names,
    check_has_adapter,
    check_not_lazy,
    check_not_merged,
    layers_of,
    lora_layers,
    replace_layers,
)
from qlora_ext.sharded import check_whole, reshard


def add_adapter(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Attach a new adapter to what config.target_modules and target_parameters name, activate it and freeze all else.

    Args:
        model: any module whose layers are nn.Linear, transformers' Conv1D, Linear4bit, bitsandbytes' Linear4bit or
            Linear8bitLt or, with other adapters on them, LoraLinear, or whose fused experts `quantize_model` has put in
            4 bits. In a model that torch.compile or data parallelism wraps, whole or in parts, names are those of the
            plain model.
        config: the LoraConfig.
        name: of the adapter; no dots, and no attribute of nn.ParameterDict.

    Raises:
        TypeError: config is no LoraConfig, or name no str.
        ValueError: there is an adapter of this name, or none can have it; a name in target_modules matches no linear
            layer, one in target_parameters no fused experts in 4 bits, or a key of rank_pattern or alpha_pattern none
            of those; merged adapters; a parameter without a shape yet (nn.LazyLinear's); a layer that fully_shard has
            sharded, or whose weight accelerate has offloaded: adapters have to be there before.

    Source: LoRA, arXiv 2106.09685, section 4.
    """
    check_not_merged("add_adapter", model)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"add_adapter: config: expected a qlora_ext.LoraConfig, got {type(config)}")
    check_name("add_adapter", name, adapter_names(model))
    check_not_lazy("add_adapter", model)
    layers = layers_of(model)
    targets = {layer_name: layers[layer_name] for layer_name in targeted(model, config)}
    reshard(model)
    check_whole("add_adapter", targets)
    check_not_offloaded("add_adapter", model, targets.items())
    attach(model, targets, config, name)
    activate("add_adapter", model, name)


def set_adapter(model: nn.Module, name: str | list[str] | None) -> None:
    """Choose the active adapters, which are applied and trained; the others stay, frozen. None: the base alone.

    What else trains in the model, if anything, goes on training.

    Args:
        model: a model with adapters.
        name: one name, several (their updates add up), or None.

    Raises:
        TypeError: name is no str, no list of them and not None.
        ValueError: there is no adapter of such a name; merged adapters; one made of inference tensors. Nothing has
            changed then.
    """
    check_not_merged("set_adapter", model)
    if name is not None and not isinstance(name, Iterable):
        raise TypeError(f"set_adapter: name: expected a str, a list of them or None, got {name!r}")
    names = [] if name is None else [name] if isinstance(name, str) else list(dict.fromkeys(name))
    for wanted in names:
        check_has_adapter("set_adapter", model, wanted)
    reshard(model)
    check_trainable("set_adapter", model, names)
    layers = list(lora_layers(model))
    for _, layer in layers:
        layer.active_adapters = [n for n in names if n in layer.configs]
    for active in (False, True):  # what two share trains if one is active
        for _, layer in layers:
            for each in layer.configs:
                if (each in names) is active:
                    for leaf in layer.leaves(each):
                        leaf.requires_grad_(active)


def check_trainable(op: str, model: nn.Module, names: Collection[str]) -> None:
    """Raise ValueError if one of these adapters is made of inference tensors."""
    for layer_name, layer in lora_layers(model):
        for each in layer.configs.keys() & set(names):
            if any(leaf.is_inference() for leaf in layer.leaves(each)):
                expected = "an adapter made outside torch.inference_mode(), so that it can be trained"
                raise ValueError(f"{op}: model: {layer_name}: expected {expected}, got inference tensors: {each}")


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; a layer left without any becomes its base layer again.

    As in PEFT: if no other was active beside it, the first by name of those left becomes active, with a UserWarning.
    Modules that were trained beside it, or loaded with it (`modules_to_save`), stay as they are.

    Raises:
        ValueError: there is no adapter of this name; merged adapters; a layer that accelerate has offloaded; hooks, or
            fully_shard, on a layer that becomes its base layer; the one that would become active is made of inference
            tensors. Nothing has changed then.
    """
    check_not_merged("delete_adapter", model)
    check_has_adapter("delete_adapter", model, name)
    check_not_offloaded("delete_adapter", model, lora_layers(model))
    for layer_name, layer in lora_layers(model):
        if layer.configs.keys() == {name} and is_hooked(layer):
            expected = "no hooks, and its class's forward: others would be lost"
            got = f"a layer that has them{of_accelerate(layer)}"
            raise ValueError(f"delete_adapter: {layer_name}: expected {expected}, got {got}")
    active = {each for _, layer in lora_layers(model) for each in layer.active_adapters}
    left = [other for other in adapter_names(model) if other != name][:1] if active == {name} else []
    check_trainable("delete_adapter", model, left)

    _detach(model, name)
    if left:
        set_adapter(model, left)
        warnings.warn(f"delete_adapter: {name!r} was active: now {left[0]!r} is", UserWarning, stacklevel=2)


def attach(model: nn.Module, names: Collection[str], config: LoraConfig, name: str) -> None:
    """Wrap what has these names, where it is not yet, and add an inactive adapter to it."""

    def wrap(module_name: str, module: nn.Module) -> nn.Module:
        if module_name not in names:
            return module
        kind = LoraExperts if isinstance(module, Stack4bit) else LoraLinear
        layer = module if isinstance(module, LoraLinear) else kind(module)  # type: ignore[arg-type]
        layer.add_adapter(name, config, module_name)
        return layer

    try:
        replace_layers(model, wrap)
    except BaseException:  # as when memory runs out
        _detach(model, name)
        raise


def _detach(model: nn.Module, name: str) -> None:
    """Remove an adapter from the layers that have it; one left without any becomes its base layer again."""

    def unwrap(_: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, LoraLinear) or name not in module.configs:
            return module
        module.delete_adapter(name)
        return module if module.configs else module.base_layer

    replace_layers(model, unwrap)


def activate(op: str, model: nn.Module, name: str, beside: Collection[Tensor] = ()) -> None:
    """Train this adapter, and what is `beside` it, and freeze all else. Warns of parameters that were trained beside
    another adapter: frozen now, save_adapter no longer saves them with any."""
    known = {id(tensor) for tensor in beside}
    for _, layer in lora_layers(model):
        known |= {id(tensor) for table in layer.tables.values() for tensor in table.parameters()}
    stopped = [own for own, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    model.requires_grad_(False)
    for own in beside:
        own.requires_grad_(isinstance(own, nn.Parameter) and own.is_floating_point())
    set_adapter(model, name)
    if stopped and len(adapter_names(model)) > 1:  # last, as a warning may be an error
        warnings.warn(
            f"{op}: {', '.join(stopped[:5])}{' and more' if len(stopped) > 5 else ''}: trained beside another adapter, "
            "now frozen: to go into its file, it has to require gradients when that is saved",
            UserWarning,
            stacklevel=3,
        )
