"""Adapters on a whole model: quantize its linear layers; add, switch, delete and merge adapters.

Saving and loading them is in adapter_files.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import nn

from qlora_ext.layer_names import children, is_named, is_pattern_of, is_wrapper, plain_modules, unwrapped
from qlora_ext.linear import Linear4bit
from qlora_ext.lora import LoraConfig, LoraLinear, check_name, dense_linear

Model = TypeVar("Model", bound=nn.Module)
AnyLinear = nn.Linear | Linear4bit | LoraLinear
# They hand the weights of their linear layers to kernels of their own.
CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def quantize_model(
    model: Model,
    *,
    skip: Iterable[str] = ("lm_head",),
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
) -> Model:
    """Replace each nn.Linear of the model by its Linear4bit, in place, one by one: at the peak one layer stands twice.

    Args:
        model: any module, on any device ("meta" too).
        skip: names of layers to leave as they are: whole names, or last parts. A layer whose weight is tied to another
            module's is left too.
        quant_type, blocksize, double_quant: as for `quantize_4bit`.

    Returns:
        The same model.

    Raises:
        TypeError: skip is no str and no list of them.
        ValueError: there is no layer to quantize, or one holds NaN or Inf (named; the ones before it are quantized).

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    if not isinstance(skip, Iterable):
        raise TypeError(f"quantize_model: skip: expected names of layers, got {skip!r}")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def convert(name: str, module: nn.Module) -> nn.Module:
        # A subclass may use its weight in its own way, as nn.MultiheadAttention does with out_proj's.
        if type(module) is not nn.Linear or is_named(name, skip) or owners[id(module.weight)] > 1:
            return module
        try:
            return Linear4bit.from_linear(module, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantize_model: {name}: {error}") from error

    if _replace(model, convert) == 0:
        raise ValueError(f"quantize_model: model: expected an nn.Linear in it that is not in skip={skip}, got none")
    return model


def add_adapter(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Attach a new adapter to the linear layers that config.target_modules names, activate it and freeze all else.

    Args:
        model: any module whose layers are nn.Linear, Linear4bit or, with other adapters on them, LoraLinear. Names in
            one of torch.compile or data parallelism, whole or in parts, are those of the plain model.
        config: the LoraConfig.
        name: of the adapter; no dots, and no attribute of nn.ParameterDict.

    Raises:
        TypeError: config is no LoraConfig, or name no str.
        ValueError: there is an adapter of this name, or none can have it; a name in target_modules matches no linear
            layer, or a key of rank_pattern or alpha_pattern none of those; merged adapters.

    Source: LoRA, arXiv 2106.09685, section 4.
    """
    check_not_merged("add_adapter", model)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"add_adapter: config: expected a qlora_ext.LoraConfig, got {type(config)}")
    check_name("add_adapter", name, adapter_names(model))
    attach(model, dict.fromkeys(target_modules(model, config), config), name)
    set_adapter(model, name)


def set_adapter(model: nn.Module, name: str | list[str] | None) -> None:
    """Choose which adapters count, and train; the others stay attached, frozen. None: the base alone.

    Args:
        model: a model with adapters.
        name: one name, several (their updates add up), or None.

    Raises:
        ValueError: there is no adapter of such a name; merged adapters.
    """
    check_not_merged("set_adapter", model)
    names = [] if name is None else [name] if isinstance(name, str) else list(dict.fromkeys(name))
    for wanted in names:
        check_has_adapter("set_adapter", model, wanted)
    model.requires_grad_(False)
    for _, layer in lora_layers(model):
        layer.active_adapters = [n for n in names if n in layer.configs]
        for active in layer.active_adapters:
            layer.lora_A[active].requires_grad_(True)
            layer.lora_B[active].requires_grad_(True)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; a layer left without any becomes its base layer again.

    Raises:
        ValueError: there is no adapter of this name; merged adapters.
    """
    check_not_merged("delete_adapter", model)
    check_has_adapter("delete_adapter", model, name)

    def remove(_: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, LoraLinear):
            return module
        if name in module.configs:
            module.delete_adapter(name)
        return module if module.configs else module.base_layer

    _replace(model, remove)


def merge_adapter(model: nn.Module, *, dequantize: bool = False) -> None:
    """Put the active adapters into the weights: W0 + sum of scaling B A.

    Args:
        model: a model with adapters.
        dequantize: False: each layer computes with one merged layer of its base's own kind (a 4-bit base is quantized
            again) while the base is kept, so that `unmerge_adapter` restores it bit for bit. True: for serving, every
            LoraLinear and Linear4bit becomes a plain nn.Linear in the base's dtype, rounded once from the float32 sum;
            this cannot be undone.

    Raises:
        ValueError: no adapter is active (with dequantize there need be none); merged adapters.

    Source: LoRA, arXiv 2106.09685, section 4.1 ("no additional inference latency").
    """
    check_not_merged("merge_adapter", model)
    for name, layer in lora_layers(model):  # before any layer is touched
        if layer.active_adapters and not layer.merged_weight().to(layer.dtype).isfinite().all():
            adapters = ", ".join(layer.active_adapters)
            raise ValueError(f"merge_adapter: {name}: expected finite values with {adapters}, got NaN or Inf")
    if not dequantize:
        active = [layer for _, layer in lora_layers(model) if layer.active_adapters]
        if not active:
            raise ValueError("merge_adapter: model: expected an active adapter, got none")
        for layer in active:
            layer.merge()
        return

    def to_dense(_: str, module: nn.Module) -> nn.Module:
        if isinstance(module, LoraLinear):
            return dense_linear(module.merged_weight(), module.base_layer)
        return dense_linear(module.dequantize(), module) if isinstance(module, Linear4bit) else module

    _replace(model, to_dense)


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


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(name, layer) of each LoraLinear in the model."""
    return ((name, module) for name, module in plain_modules(model) if isinstance(module, LoraLinear))


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters in the model."""
    return sorted({name for _, layer in lora_layers(model) for name in layer.configs})


def linear_layers(model: nn.Module) -> dict[str, AnyLinear]:
    """The layers by name that can carry an adapter; those inside a LoraLinear are not counted."""
    found = {}
    inside: set[int] = set()
    for name, module in plain_modules(model):
        if name and id(module) not in inside and isinstance(module, (AnyLinear, *CLOSED)):
            if isinstance(module, AnyLinear):
                found[name] = module
            inside.update(id(child) for child in module.modules())
    return found


def target_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the linear layers that config.target_modules means in this model.

    Raises:
        ValueError: it, or one of its names, matches none; a key of rank_pattern or alpha_pattern matches none of them.
    """
    wanted = config.target_modules
    for target in [[name] for name in wanted] if isinstance(wanted, list) else [wanted]:
        if not named_layers(model, target):
            last_parts = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})) or "none"
            expected = f"expected names of linear layers (here, by their last parts: {last_parts})"
            raise ValueError(f"add_adapter: target_modules: {expected}, got {target!r}")
    names = named_layers(model, wanted)
    for what in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, what):
            if not any(is_pattern_of(key, name) for name in names):
                raise ValueError(f"add_adapter: {what}: expected names of layers with the adapter, got {key!r}")
    return names


def named_layers(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """The names of the linear layers that `wanted`, a LoraConfig's target_modules, matches; perhaps none."""
    layers = linear_layers(model)
    if wanted == "all-linear":
        head = _output_head(model, layers)
        return [name for name in layers if name not in head]
    if isinstance(wanted, str):
        return [name for name in layers if re.fullmatch(wanted, name)]
    return [name for name in layers if is_named(name, wanted)]


def attach(model: nn.Module, configs: dict[str, LoraConfig], name: str) -> None:
    """Wrap the layers that are keys of `configs` in LoraLinear where they are not yet, and add an inactive adapter."""

    def wrap(module_name: str, module: nn.Module) -> nn.Module:
        if module_name not in configs:
            return module
        layer = module if isinstance(module, LoraLinear) else LoraLinear(module)  # type: ignore[arg-type]
        layer.add_adapter(name, configs[module_name], module_name)
        return layer

    _replace(model, wrap)


def check_has_adapter(op: str, model: nn.Module, name: str) -> None:
    """Raise ValueError unless the model has an adapter of this name."""
    if name not in adapter_names(model):
        raise ValueError(f"{op}: name: expected one of {adapter_names(model)}, got {name!r}")


def _replace(model: nn.Module, convert: Callable[[str, nn.Module], nn.Module]) -> int:
    """Put convert(name, module) in the place of each module below `model`; returns how many changed.

    What convert gives is not entered again, and a module that stands in several places is converted once.
    """
    converted: dict[int, nn.Module] = {}
    changed = 0

    def visit(prefix: str, parent: nn.Module) -> None:
        nonlocal changed
        for key, name, child in list(children(parent, prefix)):
            if id(child) not in converted:
                converted[id(child)] = child if is_wrapper(child) else convert(name, child)
                if converted[id(child)] is child and not isinstance(child, (AnyLinear, *CLOSED)):
                    visit(name, child)
            if converted[id(child)] is not child:
                changed += 1
                setattr(parent, key, converted[id(child)])
                if key == "_orig_mod":  # torch.compile's module has looked up what to call
                    parent._initialize()  # type: ignore[operator]

    visit("", model)
    return changed


def _output_head(model: nn.Module, layers: dict[str, AnyLinear]) -> set[str]:
    """The layers that make logits, by name, and those that share their weight."""
    get_head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)
    heads = {id(unwrapped(head)) for head in [get_head()] if head is not None} | {
        id(layer) for name, layer in layers.items() if is_named(name, ["lm_head"])
    }
    weights = {id(layer.weight) for layer in layers.values() if id(layer) in heads and isinstance(layer, nn.Linear)}
    return {
        name
        for name, layer in layers.items()
        if id(layer) in heads or (isinstance(layer, nn.Linear) and id(layer.weight) in weights)
    }


def check_not_merged(op: str, model: nn.Module) -> None:
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError(f"{op}: model: expected unmerged adapters (call unmerge_adapter first), got merged ones")
