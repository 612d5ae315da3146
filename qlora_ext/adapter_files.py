"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_ext.adapters import attach, check_has_adapter, check_not_merged, set_adapter
from qlora_ext.layer_names import check_name, check_regex, is_named, plain_modules, unwrapped
from qlora_ext.linear import Linear4bit
from qlora_ext.lora import LoraConfig, LoraLinear
from qlora_ext.model_layers import AnyLinear, linear_layers, lora_layers, named_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KINDS = {"lora_A": ("weight",), "lora_B": ("weight",), "base_layer": ("weight", "bias")}  # by part of a layer
_PEFTS_DEFAULTS = {"r": 8, "lora_alpha": 8}
# Fields of PEFT's config that would change what the adapter computes, and the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base's own weight
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it, into `folder` itself (made if it is not there).

    Args:
        model: a model with adapters. One of torch.compile or data parallelism is saved as the plain model is.
        folder: gets adapter_model.safetensors (float32, keys base_model.model.<layer>.lora_A.weight [r, in] and
            .lora_B.weight [out, r]) and adapter_config.json. Each is written beside and then renamed.
        name: of the adapter; it is not part of the files.

    Raises:
        ValueError: there is no adapter of this name.

    Source: PEFT's checkpoint format.
    """
    check_has_adapter("save_adapter", model, name)
    layers = {layer_name: layer for layer_name, layer in lora_layers(model) if name in layer.configs}
    config = next(iter(layers.values())).configs[name]
    # What "all-linear" means is decided differently elsewhere; and a loaded adapter may be on fewer layers than named.
    if config.target_modules == "all-linear" or _meant_modules(model, config.target_modules) != set(layers):
        config = replace(config, target_modules=_short_names(model, list(layers)))
    tensors = {}
    for layer_name, layer in layers.items():
        for part, table in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            tensors[f"{_PREFIX}{layer_name}.{part}.weight"] = table[name].detach().contiguous()
    plain = unwrapped(model)
    model_config = getattr(plain, "config", None)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(plain).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(model_config, "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "use_dora": False,
        **asdict(config),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_all(
        {
            folder / WEIGHTS_FILE: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            folder / CONFIG_FILE: lambda path: path.write_text(json.dumps(described, indent=2) + "\n"),
        }
    )


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Read an adapter that `save_adapter` or PEFT wrote, activate it and freeze all else.

    Args:
        model: a model with the layers that the adapter is for, perhaps one of torch.compile or data parallelism.
        folder: with adapter_config.json and adapter_model.safetensors.
        name: to give it. If there is an adapter of this name its weights are replaced, else it is added.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: no adapter can have this name.
        ValueError: a file is truncated or foreign, is no LoRA adapter, uses what is not supported here (by name), lacks
            tensors of a layer that its config targets, or does not fit the model. The model is then as it was.

    Source: PEFT's checkpoint format.
    """
    check_not_merged("load_adapter", model)
    check_name("load_adapter", name)
    folder = Path(folder)
    config, demands = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    layers = linear_layers(model)
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer_name, part = _parse_key(key, layers, folder)
        if part == "base_layer":
            _check_base(key, layers[layer_name], tensor, folder)
        else:
            weights.setdefault(layer_name, {})[part] = tensor
    for layer_name, parts in weights.items():
        layer, r = layers[layer_name], config.rank(layer_name)
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(f"load_adapter: model: {layer_name}: expected a layer with values, got one on meta")
        for part, shape in (("lora_A", (r, layer.in_features)), ("lora_B", (layer.out_features, r))):
            got = parts.get(part)
            if got is not None and not got.is_floating_point():
                raise ValueError(
                    f"load_adapter: {folder / WEIGHTS_FILE}: {layer_name}.{part}: expected floats, got {got.dtype}"
                )
            if got is None or tuple(got.shape) != shape:
                raise ValueError(
                    f"load_adapter: {folder / WEIGHTS_FILE}: {layer_name}.{part}: expected shape {list(shape)}, "
                    f"got {'no tensor' if got is None else list(got.shape)}"
                )
    targets = [layer_name for layer_name in named_layers(model, config.target_modules) if demands(layer_name)]
    bare = [layer_name for layer_name in targets if layer_name not in weights]
    if bare:
        raise ValueError(
            f"load_adapter: {folder / WEIGHTS_FILE}: {bare[0]}: expected tensors as for every layer that {CONFIG_FILE} "
            f"targets, got none (for {len(bare)} of {len(targets)} layers)"
        )
    existing = {n: layer.lora_A[name].shape[0] for n, layer in lora_layers(model) if name in layer.configs}
    given = {layer_name: config.rank(layer_name) for layer_name in weights}
    if existing:
        for layer_name in sorted(existing.keys() | given.keys()):
            before, now = existing.get(layer_name, "none"), given.get(layer_name, "none")
            if before != now:
                raise ValueError(
                    f"load_adapter: name: {layer_name}: expected {name!r} to have rank {before}, got {now}"
                )
    if not existing:
        attach(model, dict.fromkeys(weights, config), name)
    with torch.no_grad():
        for layer_name, layer in lora_layers(model):
            if layer_name in weights:
                layer.lora_A[name].copy_(weights[layer_name]["lora_A"])
                layer.lora_B[name].copy_(weights[layer_name]["lora_B"])
                layer.configs[name] = config
                layer.scaling[name] = config.scaling(layer_name)
    model.requires_grad_(False)
    set_adapter(model, name)


def _meant_modules(model: nn.Module, wanted: str | list[str]) -> set[str]:
    """What PEFT takes these target_modules to mean: modules of any kind. It refuses those that no adapter fits."""
    inside = {id(part) for _, layer in lora_layers(model) for part in layer.modules() if part is not layer}
    names = {name for name, module in plain_modules(model) if name and id(module) not in inside}
    return {n for n in names if (re.fullmatch(wanted, n) if isinstance(wanted, str) else is_named(n, wanted))}


def _short_names(model: nn.Module, layer_names: list[str]) -> str | list[str]:
    """What means exactly these layers in this model: the last parts of their names, the names, or a regex of them."""
    for names in ({name.rsplit(".", 1)[-1] for name in layer_names}, layer_names):
        if _meant_modules(model, list(names)) == set(layer_names):
            return sorted(names)
    return "|".join(re.escape(name) for name in sorted(layer_names))


def _write_all(writers: dict[Path, Callable[[Path], object]]) -> None:
    """Write all beside, then rename all: no failure at writing leaves half a file or half a set."""
    beside = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            write(beside[path])
        for path in writers:
            os.replace(beside[path], path)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def _read_config(path: Path) -> tuple[LoraConfig, Callable[[str], bool]]:
    """The config, and whether it demands tensors of a layer of this name that its target_modules match."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"load_adapter: {path}: expected JSON, got an error at reading: {error}") from error
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        got = given.get("peft_type") if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"load_adapter: {path}: peft_type: expected 'LORA', got {got!r}")
    for key, neutral in _NEUTRAL.items():
        if key in given and given[key] not in neutral:
            raise ValueError(f"load_adapter: {path}: {key}: expected {neutral[0]!r}, got {given[key]!r} (unsupported)")
    known = {f.name: given[f.name] for f in fields(LoraConfig) if given.get(f.name) is not None}
    try:
        return LoraConfig(**_PEFTS_DEFAULTS | known), _demands(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from error


def _demands(given: dict[str, Any]) -> Callable[[str], bool]:
    """Whether this config of PEFT's demands tensors of a layer of this name that its target_modules match."""
    targets, exclude = given.get("target_modules"), given.get("exclude_modules")
    excluded, patterns = _listed(given, "exclude_modules", str), _listed(given, "layers_pattern", str)
    indexes = _listed(given, "layers_to_transform", int)
    blocks = [rf"(?:.*?\.)?{pattern}\.(?P<index>\d+)\." for pattern in patterns]

    def demands(name: str) -> bool:
        if targets is None:  # PEFT goes by the kind of model
            return False
        if re.fullmatch(exclude, name) if isinstance(exclude, str) else is_named(name, excluded):
            return False
        if not indexes or isinstance(targets, str) or name in targets:
            return True
        matches = (re.match(block, name) for block in blocks or [r".*?\.[^.]*\.(?P<index>\d+)\."])
        return next((int(match["index"]) in indexes for match in matches if match), False)

    return demands


def _listed(given: dict[str, Any], key: str, kind: type) -> list[Any]:
    """A field that may hold several, one alone, or nothing."""
    value = given.get(key)
    values = [] if value in (None, "") else value if isinstance(value, list) else [value]
    if not all(isinstance(each, kind) for each in values):
        raise ValueError(f"{key}: expected {kind.__name__} or a list of {kind.__name__}, got {value!r}")
    for each in values if kind is str else []:
        check_regex(key, each)
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"load_adapter: {path}: expected a safetensors file, got no file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {path}: expected a whole safetensors file, got: {error}") from error
    if not tensors:
        raise ValueError(f"load_adapter: {path}: expected lora_A and lora_B tensors, got none")
    return tensors


def _parse_key(key: str, layers: dict[str, Any], folder: Path) -> tuple[str, str]:
    """(layer name, lora_A, lora_B or base_layer) of a key base_model.model.<layer>.lora_A.weight."""
    path, _, kind = key.rpartition(".")
    layer_name, _, part = path.removeprefix(_PREFIX).rpartition(".")
    if not key.startswith(_PREFIX) or kind not in _KINDS.get(part, ()):
        expected = f"keys {_PREFIX}<layer>.lora_A.weight and .lora_B.weight"
        raise ValueError(f"load_adapter: {folder / WEIGHTS_FILE}: expected {expected}, got {key!r}")
    if layer_name not in layers:
        raise ValueError(
            f"load_adapter: {folder / WEIGHTS_FILE}: {key}: expected a linear layer of the model, got none"
        )
    return layer_name, part


def _check_base(key: str, layer: AnyLinear, given: Tensor, folder: Path) -> None:
    """PEFT writes an output head beside its adapter: nothing new, unless the head was resized or trained."""
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    own = base.bias if key.endswith(".bias") else base.weight
    if own is not None and isinstance(base, Linear4bit) and own is base.weight:
        fits = given.is_floating_point() and tuple(given.shape) == (base.out_features, base.in_features)
        given = base.with_weight(given.to(base.dtype)).weight if fits and given.isfinite().all() else given
    if own is None or given.shape != own.shape or not torch.equal(given.to(own), own):
        raise ValueError(
            f"load_adapter: {folder / WEIGHTS_FILE}: {key}: expected what the model has in this place, got another"
        )
