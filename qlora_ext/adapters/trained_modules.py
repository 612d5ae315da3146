"""Modules that are trained whole beside an adapter and go with it into its file, as PEFT's modules_to_save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Set
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_ext.layer_names import unwrapped
from qlora_ext.lora.linear import LoraLinear
from qlora_ext.model_layers import adapter_names, placed_modules
from qlora_ext.sharded import gathered
from qlora_ext.weight_4bit import Weight4bit

# PEFT's ModulesToSaveWrapper refuses these.
_NOT_CALLED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def trained_modules(model: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """The names for modules_to_save, and all tensors of what PEFT takes them to mean, by their names.

    Trained modules are those that own a parameter outside adapters that requires a gradient. PEFT saves more under
    their names: modules whose names end the same; and what is tied to one of these is saved too, because PEFT unties
    it.

    Raises:
        ValueError: PEFT could not save such a module whole.
    """
    modules, places = dict(placed_modules(model)), _places(model)
    owners = {owner for owner, tensor in places.values() if tensor.requires_grad}
    while True:
        names = _outermost(owners)
        _check_savable(names, modules, places)
        meant = _meant(modules, names)
        wanted = _with_tied(places, meant)
        more = {owner for owner in (places[place][0] for place in wanted) if not _is_in(owner, meant)}
        if not more:
            break
        owners |= more
    if refused := _refused(meant, modules):
        other, reason = next(iter(refused.items()))
        name = next(name for name in names if other.endswith(name))
        raise ValueError(
            f"save_adapter: model: {name}: expected a trained module with a name that PEFT can tell from others', "
            f"got one that ends {other} too, in {reason}; to save {name} yourself, freeze it for save_adapter"
        )
    return sorted(names), {place: places[place][1] for place in wanted}


def are_weights_tied(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether PEFT can tie what is tied in these: it makes an nn.Linear of the weight alone, and drops a bias."""
    modules = dict(placed_modules(model))
    sizes = Counter(place.rpartition(".")[0] for place in tensors)  # of modules, in tensors
    ids = Counter(id(tensor) for tensor in tensors.values())
    tied = [place.rpartition(".")[0] for place, tensor in tensors.items() if ids[id(tensor)] > 1]
    embeddings = sum(isinstance(modules[owner], nn.Embedding) for owner in tied)  # T5 has three
    return bool(tied) and embeddings < 2 and all(sizes[owner] == 1 for owner in tied)


def unasked_modules(model: nn.Module, tensors: Collection[str], named: Collection[str]) -> list[str]:
    """The input embeddings and the head, where a file has the tensors of these names, but not as those of modules in
    modules_to_save, whose tensors are `named`: PEFT saves both, untrained, if the vocabulary was resized."""
    plain, both = unwrapped(model), []
    for side in ("input", "output"):
        with suppress(NotImplementedError):  # as transformers' models for images say
            both.append(getattr(plain, f"get_{side}_embeddings", lambda: None)())
    found = [name for name, module in placed_modules(model) if any(module is each for each in both)]
    return [name for name in found if f"{name}.weight" in tensors and f"{name}.weight" not in named]


def fit_modules(
    model: nn.Module, names: Collection[str], adapter: str, tensors: dict[str, Tensor], path: Path, *, resumes: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """(the model's tensor, the file's) by name, for each tensor of the modules that PEFT takes `names` to mean.

    Raises:
        ValueError: there is no such tensor in the file at `path`, or it does not fit; it would change a module that
            adapters with other names are used with (if a training `resumes`: one that it does not train).
    """
    modules, places = dict(placed_modules(model)), _places(model)
    meant = _meant(modules, names)
    if refused := _refused(meant, modules):
        name, reason = next(iter(refused.items()))
        raise ValueError(f"load_adapter: model: {name}: expected a module for {path} to replace, got one in {reason}")
    fitting: dict[str, tuple[Tensor, Tensor]] = {}
    asked = {id(tensor): place for place, (owner, tensor) in places.items() if _is_in(owner, meant)}
    first: dict[int, str] = {}  # of the places that are tied
    others = [name for name in adapter_names(model) if name != adapter]
    trained = {owner for owner, tensor in places.values() if tensor.requires_grad}
    for place in _with_tied(places, meant):
        (owner, own), given = places[place], tensors.get(place)
        if own.is_meta:
            raise ValueError(f"load_adapter: model: {place}: expected a tensor with values, got one on meta")
        twin = first.setdefault(id(own), place)
        other = twin if _is_in(owner, meant) else asked[id(own)]
        tied = "" if other == place else f" ({other}, to which it is tied in this model, is in modules_to_save)"
        if given is None or given.shape != own.shape or given.is_floating_point() != own.is_floating_point():
            got = "no tensor" if given is None else f"{given.dtype} {list(given.shape)}"
            raise ValueError(f"load_adapter: {path}: {place}: expected {own.dtype} {list(own.shape)}, got {got}{tied}")
        if twin != place and not torch.equal(given.to(own.dtype), fitting[twin][1].to(own.dtype)):
            raise ValueError(f"load_adapter: {path}: {place}: expected the same values as {twin}, got others{tied}")
        is_given = not others or (resumes and _is_in(owner, trained))
        if not is_given and not torch.equal(given.to(own.device, own.dtype), gathered(own.detach())):
            raise ValueError(
                f"load_adapter: model: {place}: expected the file's values already there, for adapters {others} are "
                f"used with it, got others (delete these adapters first, or load into another copy of the model)"
            )
        fitting[place] = own, given
    return fitting


def _places(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """(owner's name, tensor) for each name in the plain model's state_dict, without adapters."""
    places = {}
    for name, module in placed_modules(model):
        buffers = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
        for key, tensor in (module._parameters | buffers).items():
            if tensor is not None:
                places[f"{name}.{key}" if name else key] = name, tensor
    return places


def _around(name: str) -> list[str]:
    """The names of the modules that the one of this name is in, but for the model itself."""
    return [name[:end] for end, c in enumerate(name) if c == "."]


def _is_in(name: str, modules: Set[str]) -> bool:
    return not modules.isdisjoint((name, *_around(name)))


def _outermost(names: Set[str]) -> set[str]:
    return {name for name in names if names.isdisjoint(_around(name))}


def _meant(modules: Iterable[str], names: Collection[str]) -> set[str]:
    """The modules that PEFT takes these names to mean: those that end so. It looks for no dot."""
    ends = set(names)
    sizes = {len(end) for end in ends}  # few, where str.endswith would try every name
    return {m for m in modules if any(m[len(m) - size :] in ends for size in sizes if size <= len(m))}


def _with_tied(places: dict[str, tuple[str, Tensor]], modules: Set[str]) -> list[str]:
    """The places in these modules, and those that hold the same tensors."""
    ids = {id(tensor) for owner, tensor in places.values() if _is_in(owner, modules)}
    return [place for place, (_, tensor) in places.items() if id(tensor) in ids]


def _check_savable(names: Iterable[str], modules: dict[str, nn.Module], places: dict[str, tuple[str, Tensor]]) -> None:
    if refused := _refused(names, modules):
        trained = [p for p, (owner, tensor) in places.items() if tensor.requires_grad and owner in refused]
        shown = ", ".join((trained or sorted(refused))[:5]) + (" and more" if len(trained) > 5 else "")
        raise ValueError(
            f"save_adapter: model: expected trained parameters in modules that PEFT can save whole, got {shown} in "
            f"{next(iter(refused.values()))} (freeze them, or save them yourself and then freeze them)"
        )


def _refused(names: Iterable[str], modules: dict[str, nn.Module]) -> dict[str, str]:
    return {name: reason for name in names if (reason := _why_not(name, modules))}


def _why_not(name: str, modules: dict[str, nn.Module]) -> str:
    """Why PEFT cannot save this module whole; "" if it can."""
    module = modules[name]
    parts = list(module.modules())
    if not name:
        return "the model itself, not in a module of it"
    above = (modules.get(other) for other in _around(name))
    if any(isinstance(each, LoraLinear) for each in (*parts, *above)):
        return "a layer with an adapter (target_modules can leave it out)"
    if any(isinstance(part, Weight4bit) for part in parts):
        return "a layer in 4 bits (quantize_model's skip can leave it out)"
    if isinstance(module, _NOT_CALLED):
        return f"a {type(module).__name__}"
    if any(type(part).get_extra_state is not nn.Module.get_extra_state for part in parts):
        return "a module that saves more than tensors"
    return ""
