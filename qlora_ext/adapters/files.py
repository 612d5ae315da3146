"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qlora_ext.adapters.attach import activate, attach, check_trainable
from qlora_ext.adapters.peft_config import CONFIG_FILE, describe, read_config
from qlora_ext.adapters.peft_layout import from_file, layers_by_key, read_tensors, shape_in_file, to_file
from qlora_ext.adapters.trained_modules import are_weights_tied, fit_modules, trained_modules, unasked_modules
from qlora_ext.dense_linear import dense_class, out_and_in, stored_shape
from qlora_ext.experts import Experts4bit
from qlora_ext.layer_names import is_named, plain_modules
from qlora_ext.lora.experts import LoraExperts
from qlora_ext.lora.linear import base_of
from qlora_ext.lora.names import check_name
from qlora_ext.model_layers import (
    AnyLinear,
    check_has_adapter,
    check_not_lazy,
    check_not_merged,
    expert_layers,
    linear_layers,
    lora_layers,
    named_layers,
)
from qlora_ext.sharded import check_whole, fill, gathered, reshard
from qlora_ext.weight_4bit import Weight4bit
from qlora_ext.whole_files import write_files

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KINDS = {"lora_A": ("weight",), "lora_B": ("weight",), "base_layer": ("weight", "bias")}  # by part of a layer


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it, into `folder` itself (made if it is not there).

    Other parameters that require a gradient when this is called (of a new head, of embeddings) are saved, too: each
    module that owns some is saved whole, as PEFT's `modules_to_save`. Those that are frozen by then are not: adding or
    loading another adapter freezes them (and warns).

    Args:
        model: a model with adapters. One of torch.compile or data parallelism is saved as the plain model is. With
            FSDP2 every process must call this, and writes the same files, into the same folder or another.
        folder: gets adapter_model.safetensors (float32, keys base_model.model.<layer>.lora_A.weight [r, in] and
            .lora_B.weight [out, r], of fused experts [experts * r, in] and [out, r * experts] under keys as in
            peft_layout.py; base_model.model.<name>, in its own dtype and shape, of each tensor of a trained module) and
            adapter_config.json. Each is written beside and then renamed.
        name: of the adapter; it is not part of the files.

    Raises:
        ValueError: there is no adapter of this name; a trained parameter is in no module that PEFT can save whole: it
            belongs to the model itself, to a layer with an adapter or in 4 bits, or to a list or dict of modules; a
            tensor is on meta, as of a trained module that accelerate has offloaded (of an adapter it is read, but in a
            module of accelerate's preload_module_classes).
        OSError: a file cannot be written, as on a full disk; those that were there are as they were.

    Source: PEFT's checkpoint format.
    """
    check_has_adapter("save_adapter", model, name)
    reshard(model)
    layers = {layer_name: layer for layer_name, layer in lora_layers(model) if name in layer.configs}
    config = next(iter(layers.values())).configs[name]
    experts = [n for n, layer in layers.items() if isinstance(layer, LoraExperts)]
    linear = [n for n, layer in layers.items() if not isinstance(layer, LoraExperts)]
    # PEFT's "all-linear" means other layers than ours, and a loaded adapter may be on fewer layers than its config
    # names: write names that mean exactly these.
    if config.target_modules == "all-linear" or _meant_modules(model, config.target_modules) != set(linear):
        config = replace(config, target_modules=_short_names(model, linear))
    if _meant_parameters(model, config.target_parameters) != set(experts):
        config = replace(config, target_parameters=experts)
    modules, others = trained_modules(model)
    tensors = {f"{_PREFIX}{own}": _to_write(own, tensor) for own, tensor in others.items()}
    for key, layer_name in layers_by_key(linear, experts).items():
        layer = layers[layer_name]
        for part, table in layer.tables.items():
            (tensor,) = table.forward([name])  # with its values, if accelerate has offloaded it
            whole = _to_write(f"{layer_name}.{part}.{name}", tensor)
            tensors[f"{_PREFIX}{key}.{part}.weight"] = to_file(part, whole)
    conv1d = any(dense_class(layers[layer_name].base_layer) is not nn.Linear for layer_name in linear)
    described = describe(model, config, modules, tied=are_weights_tied(model, others), conv1d=conv1d)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(
        {
            folder / WEIGHTS_FILE: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            folder / CONFIG_FILE: lambda path: path.write_text(json.dumps(described, indent=2) + "\n"),
        }
    )


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Read an adapter that `save_adapter` or PEFT wrote, activate it and freeze all else.

    Modules that were trained whole beside it (`modules_to_save`) are copied into the model's own, which then train too.
    Embeddings and a head that PEFT saved for a larger vocabulary are copied, too, and frozen. All these copies stay
    whichever adapter is active, or none, and are refused where they would change what other adapters compute.

    Args:
        model: a model with the layers that the adapter is for, perhaps one of torch.compile or data parallelism. With
            FSDP2 every process must call this, and only an adapter that is there already can be loaded.
        folder: with adapter_config.json and adapter_model.safetensors.
        name: to give it. If there is an adapter of this name its weights are replaced, else it is added.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: no adapter can have this name.
        ValueError: a file is truncated or foreign, is no LoRA adapter, uses what is not supported here (by name), lacks
            tensors of a layer or module that its config names, or does not fit the model; it would change a module
            that adapters of other names are used with; the adapter of this name has a parametrization, or is made of
            inference tensors; a new adapter for layers that fully_shard has sharded; merged adapters; a parameter
            without a shape yet. The model is then as it was.

    Source: PEFT's checkpoint format.
    """
    activate("load_adapter", model, name, _read(model, folder, name, resumes=False))


def resume_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str) -> None:
    """As `load_adapter`, to resume a training: what trains, what is active and what dropout drops stays as it is, and
    the modules that train get the file's values, even if there are other adapters."""
    _read(model, folder, name, resumes=True)


def _read(model: nn.Module, folder: str | os.PathLike[str], name: str, *, resumes: bool) -> list[Tensor]:
    """Read an adapter, inactive if it is new, and return the tensors of modules_to_save in the model."""
    check_not_merged("load_adapter", model)
    check_not_lazy("load_adapter", model)
    check_name("load_adapter", name)
    reshard(model)
    folder = Path(folder)
    path = folder / WEIGHTS_FILE
    config, module_names, demands = read_config(folder)
    tensors = read_tensors(path)
    given = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    modules = fit_modules(model, module_names, name, given, path, resumes=resumes)
    unasked = unasked_modules(model, given, modules)
    copied = modules | fit_modules(model, unasked, name, given, path, resumes=resumes)
    linear, experts = linear_layers(model), expert_layers(model)
    layers = linear | experts
    adapted = [layer_name for layer_name in experts if is_named(layer_name, config.target_parameters)]
    for other in sorted(_meant_parameters(model, config.target_parameters).difference(adapted)):
        expected = "weights of fused experts in 4 bits (quantize_model, before)"
        raise ValueError(f"load_adapter: {folder / CONFIG_FILE}: target_parameters: expected {expected}, got {other}")
    by_key = layers_by_key(linear, adapted)
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_PREFIX) and key.removeprefix(_PREFIX) in copied:
            continue
        layer_name, part = _parse_key(key, by_key, path)
        if part == "base_layer":
            _check_base(key, layers[layer_name], tensor, path)
        else:
            weights.setdefault(layer_name, {})[part] = tensor
    if not weights:
        raise ValueError(f"load_adapter: {path}: expected lora_A and lora_B tensors, got none")
    for layer_name, parts in weights.items():
        _check_parts(layer_name, layers[layer_name], parts, config.rank(layer_name), path)
    targets = [layer_name for layer_name in named_layers(model, config.target_modules) if demands(layer_name)]
    _check_complete(targets + adapted, weights, path)
    if existing := {n: layer.lora_A[name].shape[-2] for n, layer in lora_layers(model) if name in layer.configs}:
        _check_not_computed(model, name)
        check_trainable("load_adapter", model, [name])
        _check_ranks(name, existing, {layer_name: config.rank(layer_name) for layer_name in weights})
    else:
        check_whole("load_adapter", {layer_name: layers[layer_name] for layer_name in weights})
        attach(model, weights, config, name)
    loaded = {layer_name: layer for layer_name, layer in lora_layers(model) if layer_name in weights}
    # Resumed with dropout as it is: trainers, as TRL's, may have switched it off.
    kept = {layer_name: layer.configs[name].lora_dropout for layer_name, layer in loaded.items() if resumes}
    configs = {layer_name: replace(config, lora_dropout=p) for layer_name, p in kept.items()}
    for layer_name, layer in loaded.items():
        for part, table in layer.tables.items():
            fill(table[name], from_file(part, weights[layer_name][part], table[name]))
        dropout = layer.lora_dropout[name]
        layer.set_config(name, configs.get(layer_name, config), layer_name)
        if resumes:
            layer.lora_dropout[name] = dropout
    for own, saved in copied.values():
        fill(own, saved)
    return [own for own, _ in modules.values()]


def _meant_modules(model: nn.Module, wanted: str | list[str]) -> set[str]:
    """What PEFT takes these target_modules to mean: modules of any kind. It refuses those that no adapter fits."""
    inside = {id(part) for _, layer in lora_layers(model) for part in layer.modules() if part is not layer}
    inside |= {id(part) for m in model.modules() if isinstance(m, Experts4bit) for part in m.modules()}  # parameters
    names = {name for name, module in plain_modules(model) if name and id(module) not in inside}
    return {n for n in names if (re.fullmatch(wanted, n) if isinstance(wanted, str) else is_named(n, wanted))}


def _meant_parameters(model: nn.Module, wanted: list[str]) -> set[str]:
    """What PEFT takes these target_parameters to mean: parameters of any kind."""
    own = {f"{name}.{key}".replace(".base_layer.", ".") for name, m in plain_modules(model) for key in m._parameters}
    return {n for n in own.union(expert_layers(model)) if is_named(n, wanted)}


def _short_names(model: nn.Module, layer_names: list[str]) -> str | list[str]:
    """What means exactly these layers in this model: the last parts of their names, the names, or a regex of them."""
    for names in ({name.rsplit(".", 1)[-1] for name in layer_names}, layer_names):
        if _meant_modules(model, list(names)) == set(layer_names):
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(layer_names))


def _to_write(name: str, tensor: Tensor) -> Tensor:
    """Whole, and in memory of its own, as safetensors wants it."""
    if tensor.is_meta:
        raise ValueError(f"save_adapter: model: {name}: expected a tensor with values, got one on meta")
    return gathered(tensor.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)


def _parse_key(key: str, by_key: dict[str, str], path: Path) -> tuple[str, str]:
    """(layer name, lora_A, lora_B or base_layer) of a key of the file; `by_key`: what layers_by_key gives."""
    start, _, kind = key.rpartition(".")
    start, _, part = start.removeprefix(_PREFIX).rpartition(".")
    if not key.startswith(_PREFIX) or kind not in _KINDS.get(part, ()):
        expected = f"keys {_PREFIX}<layer>.lora_A.weight and .lora_B.weight, or of tensors in modules_to_save"
        raise ValueError(f"load_adapter: {path}: expected {expected}, got {key!r}")
    if start not in by_key:
        expected = "a linear layer, or fused experts in 4 bits, of the model"
        raise ValueError(f"load_adapter: {path}: {key}: expected {expected}, got none")
    return by_key[start], part


def _check_base(key: str, layer: AnyLinear, given: Tensor, path: Path) -> None:
    """PEFT writes an output head beside its adapter: nothing new, unless the head was resized or trained."""
    base = base_of(layer)
    own = base.bias if key.endswith(".bias") else base.weight
    own = own if own is None else gathered(own.detach())
    if isinstance(base, Weight4bit):
        shape = stored_shape(base.dense_class, *out_and_in(base))
        fits = given.is_floating_point() and list(given.shape) == shape
        fits = fits and bool(given.to(base.dtype).isfinite().all())
        given = base.with_weight(given.to(base.dtype)).weight if fits else given
    if own is None or own.is_meta or not torch.equal(given.to(own), own):
        raise ValueError(f"load_adapter: {path}: {key}: expected what the model has in this place, got another")


def _check_parts(name: str, layer: AnyLinear, parts: dict[str, Tensor], r: int, path: Path) -> None:
    """That a file has both matrices of an adapter of this rank on this layer."""
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ValueError(f"load_adapter: model: {name}: expected a layer with values, got one on meta")
    for part in ("lora_A", "lora_B"):
        given, shape = parts.get(part), shape_in_file(layer, part, r)
        if given is not None and not given.is_floating_point():
            raise ValueError(f"load_adapter: {path}: {name}.{part}: expected floats, got {given.dtype}")
        if given is None or tuple(given.shape) != shape:
            got = "no tensor" if given is None else list(given.shape)
            raise ValueError(f"load_adapter: {path}: {name}.{part}: expected shape {list(shape)}, got {got}")


def _check_complete(targets: list[str], given: Collection[str], path: Path) -> None:
    """That no layer which the config targets is left out of those that the file has tensors of."""
    bare = [layer_name for layer_name in targets if layer_name not in given]
    if bare:
        raise ValueError(
            f"load_adapter: {path}: {bare[0]}: expected tensors as for every layer that {CONFIG_FILE} targets, "
            f"got none (for {len(bare)} of {len(targets)} layers)"
        )


def _check_not_computed(model: nn.Module, name: str) -> None:
    """That values can be put into the adapter of this name: those of a parametrization are computed at each look."""
    for layer_name, layer in lora_layers(model):
        for part, table in layer.tables.items():
            if is_parametrized(table, name):
                at = f"load_adapter: model: {layer_name}.{part}.{name}"
                raise ValueError(f"{at}: expected a parameter, got one with a parametrization")


def _check_ranks(name: str, existing: dict[str, int], given: dict[str, int]) -> None:
    """That the adapter of this name is on the same layers in the file, with the same ranks."""

    def has(r: int | None) -> str:
        return f"has rank {r}" if r else "is not on this layer"

    for layer_name in sorted(existing.keys() | given.keys()):
        own, new = existing.get(layer_name), given.get(layer_name)
        if own != new:
            raise ValueError(
                f"load_adapter: name: {layer_name}: expected the model's adapter {name!r} to be as the file's, which "
                f"{has(new)}, got one that {has(own)} (delete_adapter it first, or load under another name)"
            )
