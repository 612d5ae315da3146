"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_ext.adapters import (
    attach,
    check_has_adapter,
    check_not_merged,
    linear_layers,
    lora_layers,
    named_layers,
    set_adapter,
)
from qlora_ext.lora import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
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
        model: a model with adapters.
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
    if config.target_modules == "all-linear" or set(named_layers(model, config.target_modules)) != set(layers):
        config = replace(config, target_modules=_short_names(model, list(layers)))
    tensors = {}
    for layer_name, layer in layers.items():
        for part, table in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            tensors[f"{_PREFIX}{layer_name}.{part}.weight"] = table[name].detach().contiguous()
    model_config = getattr(model, "config", None)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
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
        model: a model with the layers that the adapter is for.
        folder: with adapter_config.json and adapter_model.safetensors.
        name: to give it. If there is an adapter of this name its weights are replaced, else it is added.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or foreign, is no LoRA adapter, uses what is not supported here (by name), or
            does not fit the model. The model is then as it was.

    Source: PEFT's checkpoint format.
    """
    check_not_merged("load_adapter", model)
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    layers = linear_layers(model)
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer_name, part = _parse_key(key, layers, folder)
        weights.setdefault(layer_name, {})[part] = tensor
    for layer_name, parts in weights.items():
        layer, r = layers[layer_name], config.rank(layer_name)
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
    existing = {n: layer.lora_A[name].shape[0] for n, layer in lora_layers(model) if name in layer.configs}
    given = {layer_name: config.rank(layer_name) for layer_name in weights}
    if existing and existing != given:
        raise ValueError(f"load_adapter: name: expected ranks {existing} of adapter {name!r}, got {given}")
    if not existing:
        attach(model, dict.fromkeys(weights, config), name)
    with torch.no_grad():
        for layer_name, layer in lora_layers(model):
            if layer_name in weights:
                layer.lora_A[name].copy_(weights[layer_name]["lora_A"])
                layer.lora_B[name].copy_(weights[layer_name]["lora_B"])
                layer.configs[name] = config
                layer.scaling[name] = config.scaling(layer_name)
    set_adapter(model, name)


def _short_names(model: nn.Module, layer_names: list[str]) -> list[str]:
    """The last parts of the names, if these mean exactly the same layers in this model; else the names themselves."""
    last_parts = {name.rsplit(".", 1)[-1] for name in layer_names}
    meant = {name for name in linear_layers(model) if name.rsplit(".", 1)[-1] in last_parts}
    return sorted(last_parts) if meant == set(layer_names) else sorted(layer_names)


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


def _read_config(path: Path) -> LoraConfig:
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
        return LoraConfig(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from error


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
    """(layer name, lora_A or lora_B) of a key base_model.model.<layer>.lora_A.weight."""
    layer_name, _, part = key.removesuffix(".weight").removeprefix(_PREFIX).rpartition(".")
    if not key.startswith(_PREFIX) or not key.endswith(".weight") or part not in ("lora_A", "lora_B"):
        expected = f"keys {_PREFIX}<layer>.lora_A.weight and .lora_B.weight"
        raise ValueError(f"load_adapter: {folder / WEIGHTS_FILE}: expected {expected}, got {key!r}")
    if layer_name not in layers:
        raise ValueError(
            f"load_adapter: {folder / WEIGHTS_FILE}: {key}: expected a linear layer of the model, got none"
        )
    return layer_name, part
