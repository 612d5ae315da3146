"""Adapters on a whole model: add, switch, delete and merge them.

Saving and loading them is in adapter_files.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from qlora_ext.adapter_targets import targeted
from qlora_ext.experts import Stack4bit, dequantize_experts, replaced_experts
from qlora_ext.functional import has_values
from qlora_ext.layer_hooks import check_not_hooked, has_other_forward, is_hooked
from qlora_ext.layer_names import check_name, plain_modules
from qlora_ext.linear import Linear4bit, dense
from qlora_ext.lora import LoraLinear, base_of
from qlora_ext.lora_config import LoraConfig
from qlora_ext.lora_experts import LoraExperts
from qlora_ext.model_layers import AnyLinear, adapter_names, layers_of, lora_layers, replace_layers
from qlora_ext.sharded import check_whole, reshard


def add_adapter(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Attach a new adapter to what config.target_modules and target_parameters name, activate it and freeze all else.

    Args:
        model: any module whose layers are nn.Linear, transformers' Conv1D, Linear4bit or, with other adapters on them,
            LoraLinear, or whose fused experts `quantize_model` has put in 4 bits. Names in one of torch.compile or data
            parallelism, whole or in parts, are those of the plain model.
        config: the LoraConfig.
        name: of the adapter; no dots, and no attribute of nn.ParameterDict.

    Raises:
        TypeError: config is no LoraConfig, or name no str.
        ValueError: there is an adapter of this name, or none can have it; a name in target_modules matches no linear
            layer, one in target_parameters no fused experts in 4 bits, or a key of rank_pattern or alpha_pattern none
            of those; merged adapters; a layer that fully_shard has sharded, or whose weight accelerate has offloaded:
            adapters have to be there before.

    Source: LoRA, arXiv 2106.09685, section 4.
    """
    check_not_merged("add_adapter", model)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"add_adapter: config: expected a qlora_ext.LoraConfig, got {type(config)}")
    check_name("add_adapter", name, adapter_names(model))
    layers = layers_of(model)
    targets = {layer_name: layers[layer_name] for layer_name in targeted(model, config)}
    reshard(model)
    check_whole("add_adapter", targets)
    _check_not_offloaded("add_adapter", model, targets.items())
    attach(model, targets, config, name)
    activate("add_adapter", model, name)


def set_adapter(model: nn.Module, name: str | list[str] | None) -> None:
    """Choose which adapters count, and train; the others stay attached, frozen. None: the base alone.

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
    layers = list(lora_layers(model))
    for layer_name, layer in layers:  # before any switches
        for each in layer.configs.keys() & set(names):
            if any(leaf.is_inference() for leaf in layer.leaves(each)):
                expected = "an adapter made outside torch.inference_mode(), so that it can be trained"
                raise ValueError(
                    f"set_adapter: model: {layer_name}: expected {expected}, got inference tensors: {each}"
                )
    for _, layer in layers:
        layer.active_adapters = [n for n in names if n in layer.configs]
    for active in (False, True):  # what two share trains if one is active
        for _, layer in layers:
            for each in layer.configs:
                if (each in names) is active:
                    for leaf in layer.leaves(each):
                        leaf.requires_grad_(active)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; a layer left without any becomes its base layer again.

    As in PEFT: if no other was active beside it, the first by name of those left becomes active, with a UserWarning.
    Modules that were trained beside it, or loaded with it (`modules_to_save`), stay as they are.

    Raises:
        ValueError: there is no adapter of this name; merged adapters; a layer that accelerate has offloaded; hooks, or
            fully_shard, on a layer that becomes its base layer. Nothing has changed then.
    """
    check_not_merged("delete_adapter", model)
    check_has_adapter("delete_adapter", model, name)
    _check_not_offloaded("delete_adapter", model, lora_layers(model))
    for layer_name, layer in lora_layers(model):
        if layer.configs.keys() == {name} and is_hooked(layer):
            expected = "no hooks, and its class's forward: others would be lost"
            raise ValueError(f"delete_adapter: {layer_name}: expected {expected}, got a layer that has them")
    was_active = any(name in layer.active_adapters for _, layer in lora_layers(model))

    _detach(model, name)
    left = adapter_names(model)
    if was_active and left and not any(layer.active_adapters for _, layer in lora_layers(model)):
        set_adapter(model, left[0])
        warnings.warn(f"delete_adapter: {name!r} was active: now {left[0]!r} is", UserWarning, stacklevel=2)


@torch.inference_mode(False)  # autograd saves no inference tensor, not even a frozen one
def merge_adapter(model: nn.Module, *, dequantize: bool = False) -> None:
    """Put the active adapters into the weights: W0 + sum of scaling B A.

    Args:
        model: a model with adapters.
        dequantize: False: each layer computes with one merged layer of its base's own kind (a 4-bit base is quantized
            again; so are experts) while the base is kept, so that `unmerge_adapter` restores it bit for bit. True: for
            serving, every LoraLinear and Linear4bit becomes a plain nn.Linear (or Conv1D, if it was one) in the base's
            dtype, rounded once from the float32 sum, and fused experts in 4 bits become a plain parameter; this cannot
            be undone. A base with hooks, or a subclass with a forward of its own, does with W0 + B A what it did with
            W0.

    Merged or not, the state_dict holds the base and the adapters; a merged model that loads one merges them again.

    Raises:
        TypeError: a base has a weight in a form of others' (bitsandbytes' layers), or a forward not of its class.
        ValueError: no adapter is active (with dequantize there need be none); merged adapters; NaN or Inf; a layer that
            fully_shard has sharded, or in a module that accelerate has offloaded; with dequantize a layer with hooks,
            which would be lost. The model is then as it was.

    Source: LoRA, arXiv 2106.09685, section 4.1 ("no additional inference latency").
    """
    check_not_merged("merge_adapter", model)
    reshard(model)
    layers = layers_of(model)
    layers = {n: m for n, m in layers.items() if isinstance(m, LoraLinear) or dequantize}
    for name, module in plain_modules(model) if dequantize else ():
        if has_other_forward(module) and replaced_experts(module):
            check_not_hooked("merge_adapter", name, module)  # accelerate's forward knows their storage by its name
    check_whole("merge_adapter", layers, "save_adapter, and merge it in a model without fully_shard")
    own = ((n, m) for n, m in layers.items() if not has_other_forward(base_of(m)))  # merged_weight refuses the others
    _check_not_offloaded("merge_adapter", model, own)
    if not dequantize:
        active = {name: layer for name, layer in lora_layers(model) if layer.active_adapters}
        if not active:
            raise ValueError("merge_adapter: model: expected an active adapter, got none")
        try:
            for name, adapted in active.items():
                adapted.merge(_merged_weight(name, adapted))
        except BaseException:
            for adapted in active.values():
                adapted.unmerge()
            raise
        return
    _check_dense(layers)
    del own, layers  # so that none is kept longer than it is needed

    def to_dense(_: str, module: nn.Module) -> nn.Module:
        if isinstance(module, (Stack4bit, LoraExperts)):
            return module
        if isinstance(module, LoraLinear):
            return dense(module.base_layer, module.merged_weight())
        return dense(module, module.dequantize(torch.float32)) if isinstance(module, Linear4bit) else module

    replace_layers(model, to_dense)
    for module in [module for module in model.modules() if replaced_experts(module)]:
        dequantize_experts(module)


def _check_dense(layers: dict[str, AnyLinear]) -> None:
    """That each of these can become a dense layer, before any does."""
    for name, layer in layers.items():
        for lost in (layer, base_of(layer)):
            if isinstance(lost, (LoraLinear, Linear4bit)):
                check_not_hooked("merge_adapter", name, lost)
        if isinstance(layer, LoraLinear):
            _merged_weight(name, layer)


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`: the base is bit for bit what it was, the adapters are active again.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for _, layer in lora_layers(model) if layer.merged]
    if not merged:
        raise ValueError("unmerge_adapter: model: expected merged adapters, got none")
    for layer in merged:
        layer.unmerge()


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
    """Train this adapter, and what is `beside` it, and freeze all else. Warns of what was trained with another
    adapter: it goes into the file of none from now on."""
    known = {id(tensor) for tensor in beside}
    for _, layer in lora_layers(model):
        known |= {id(tensor) for table in layer.tables.values() for tensor in table.parameters()}
    stopped = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
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


def _check_not_offloaded(op: str, model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if parameters of a layer are kept elsewhere, and accelerate's hooks on it, or on a module that
    it is in, know which."""
    hooked = {id(part) for module in model.modules() if has_other_forward(module) for part in module.modules()}
    for name, layer in layers:
        if any(id(part) in hooked and any(t.is_meta for t in part.parameters(False)) for part in layer.modules()):
            expected = "a layer in memory (add, delete and merge adapters before accelerate's dispatch or offload)"
            raise ValueError(f"{op}: model: {name}: expected {expected}, got one on meta with accelerate's hook")


def _merged_weight(name: str, layer: LoraLinear) -> Tensor:
    """The layer's, checked."""
    try:
        weight = layer.merged_weight()
    except (TypeError, ValueError) as error:
        raise type(error)(f"merge_adapter: {name}: {error}") from error
    if has_values(weight) and not weight.to(layer.dtype).isfinite().all():
        adapters = ", ".join(layer.active_adapters)
        raise ValueError(f"merge_adapter: {name}: expected finite values with {adapters}, got NaN or Inf")
    return weight


def check_has_adapter(op: str, model: nn.Module, name: str) -> None:
    """Raise ValueError unless the model has an adapter of this name."""
    if name not in adapter_names(model):
        raise ValueError(f"{op}: name: expected one of {adapter_names(model)}, got {name!r}")


def check_not_merged(op: str, model: nn.Module) -> None:
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError(f"{op}: model: expected unmerged adapters (call unmerge_adapter first), got merged ones")
