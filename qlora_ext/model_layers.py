"""The linear layers and fused experts of a model: which there are, which a name means, and exchanging them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeGuard

from torch import nn
from torch.nn.parameter import is_lazy

from qlora_ext.dense_linear import computes_otherwise, is_dense_linear
from qlora_ext.experts import Experts4bit, Stack4bit
from qlora_ext.layer_names import children, is_compiled, is_named, is_within, is_wrapper, plain_modules, unwrapped
from qlora_ext.lora.experts import LoraExperts
from qlora_ext.lora.linear import LoraLinear, base_of
from qlora_ext.weight_4bit import Weight4bit

AnyLinear = nn.Linear | Weight4bit | LoraLinear  # and transformers' Conv1D, which is taken for an nn.Linear
# torch's modules that use the weights of their linear layers without calling the layers: they hand them to kernels of
# their own, or to products by parts.
CLOSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# What transformers calls the last layers of its language models and classifiers. They are small, and their errors go
# into the result as they are; a classifier's is new and has to train.
HEADS = ("lm_head", "score", "classifier", "qa_outputs")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(name, layer) of each LoraLinear in the model, LoraExperts among them."""
    return ((name, module) for name, module in plain_modules(model) if isinstance(module, LoraLinear))


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters in the model."""
    return sorted({name for _, layer in lora_layers(model) for name in layer.configs})


def check_has_adapter(op: str, model: nn.Module, name: str) -> None:
    """Raise ValueError unless the model has an adapter of this name."""
    names = adapter_names(model)
    if not names:
        raise ValueError(f"{op}: model: expected one with adapters (of add_adapter, load_adapter), got one without")
    if name not in names:
        raise ValueError(f"{op}: name: expected one of {names}, got {name!r}")


def check_not_merged(op: str, model: nn.Module) -> None:
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError(f"{op}: model: expected unmerged adapters (call unmerge_adapter first), got merged ones")


def check_not_lazy(op: str, model: nn.Module) -> None:
    """Raise ValueError if the model has parameters without a shape yet, as nn.LazyLinear's before the first forward."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            expected = "parameters that have their shape (call the model once before)"
            raise ValueError(f"{op}: model: {name}: expected {expected}, got an uninitialized one")


def linear_layers(model: nn.Module) -> dict[str, AnyLinear]:
    """The linear layers by name that can carry an adapter; those inside a LoraLinear are not counted."""
    return {name: layer for name, layer in layers_of(model).items() if not isinstance(layer, (Stack4bit, LoraExperts))}


def expert_layers(model: nn.Module) -> dict[str, Stack4bit | LoraExperts]:
    """What holds the weights of fused experts in 4 bits, by the names of those weights."""
    return {name: layer for name, layer in layers_of(model).items() if isinstance(layer, (Stack4bit, LoraExperts))}


def layers_of(model: nn.Module) -> dict[str, AnyLinear]:
    """The linear layers and the fused experts in 4 bits, by name."""
    found = {}
    closed = [module for name, module in plain_modules(model) if name and isinstance(module, CLOSED)]
    inside = {id(child) for module in closed for child in module.modules()}  # wherever else they stand
    for name, module in plain_modules(model):
        if name and id(module) not in inside and _is_linear(module):
            found[name] = module
            inside.update(id(child) for child in module.modules())
        elif isinstance(module, Experts4bit) and not module.replaced:  # no part of a module that computes with it
            inside.update(id(child) for child in module.modules())
    return found


def named_layers(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """The names of the linear layers that `wanted`, a LoraConfig's target_modules, matches; perhaps none."""
    layers = linear_layers(model)
    if wanted == "all-linear":
        head = output_head(model)
        return [name for name, layer in layers.items() if name not in head and not computes_otherwise(base_of(layer))]
    if isinstance(wanted, str):
        return [name for name in layers if re.fullmatch(wanted, name)]
    return [name for name in layers if is_named(name, wanted)]


def _is_linear(module: nn.Module) -> TypeGuard[AnyLinear]:
    return is_dense_linear(module) or isinstance(module, (Weight4bit, LoraLinear))


def closed_modules(model: nn.Module) -> dict[str, str]:
    """The CLOSED modules with linear layers in them by name, and what their classes are called."""
    closed = {name: module for name, module in plain_modules(model) if isinstance(module, CLOSED)}
    return {name: type(module).__name__ for name, module in closed.items() if any(map(_is_linear, module.modules()))}


def placed_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules but wrappers and what adapters consist of, in each place where they stand."""
    if not is_wrapper(module):
        yield name, module
    for key, child_name, child in children(module, name):
        if not isinstance(module, LoraLinear) or key == "base_layer":
            yield from placed_modules(child, child_name)


def replace_layers(
    parent: nn.Module,
    convert: Callable[[str, nn.Module], nn.Module],
    prefix: str = "",
    converted: dict[int, nn.Module] | None = None,
) -> None:
    """Put convert(name, module) in the place of each module below `parent`.

    What convert gives is not entered again, and a module that stands in several places is converted once.
    """
    converted = {} if converted is None else converted
    for key, name in [(key, name) for key, name, _ in children(parent, prefix)]:  # no child is kept alive here
        child = parent._modules[key]
        assert child is not None
        if id(child) not in converted:
            converted[id(child)] = child if is_wrapper(child) else convert(name, child)
            if converted[id(child)] is child and not _is_linear(child) and not isinstance(child, CLOSED):
                replace_layers(child, convert, name, converted)
        if converted[id(child)] is not child:
            setattr(parent, key, converted[id(child)])
            for held in vars(parent).values():
                if isinstance(held, list) and any(each is child for each in held):  # whose forward goes through that
                    held[:] = [converted[id(child)] if each is child else each for each in held]
            if is_compiled(parent):  # it has looked up what to call
                parent._initialize()  # type: ignore[operator]


def output_head(model: nn.Module) -> set[str]:
    """The layers that make logits, scores and the like, by name, and those that share their weight."""
    layers = {name: base_of(layer) for name, layer in linear_layers(model).items()}
    heads = {id(layer) for name, layer in layers.items() if is_within(name, HEADS)}
    # A head that also stands under another name.
    heads |= {id(base_of(module)) for name, module in placed_modules(model) if is_named(name, HEADS)}
    for _, part in plain_modules(model):  # a model of transformers may stand in another's, as SentenceTransformers'
        head = None
        with suppress(NotImplementedError, AttributeError):  # one may be without its head by now
            head = getattr(part, "get_output_embeddings", lambda: None)()
        several = head if isinstance(head, nn.ModuleList) else [head]  # MusicGen has them
        heads |= {id(base_of(unwrapped(module))) for module in several if isinstance(module, nn.Module)}
    # Of parametrized layers `weight` is made anew at each look, and the next may have its id.
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    tied = {id(weights[name]) for name, layer in layers.items() if id(layer) in heads and weights[name] is not None}
    return {name for name, layer in layers.items() if id(layer) in heads or id(weights[name]) in tied}
