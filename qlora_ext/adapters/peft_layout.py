"""PEFT's file of tensors: under which key and in which shape it has the factors of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_ext.dense_linear import out_and_in
from qlora_ext.experts import Stack4bit
from qlora_ext.lora.linear import base_of
from qlora_ext.model_layers import AnyLinear


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of the file, by key."""
    if not path.is_file():
        pickle = path.with_suffix(".bin")
        got = "no file"
        if pickle.is_file():
            got = f"only {pickle.name}, a pickle, which is not read (PEFT's save_pretrained writes safetensors)"
        raise FileNotFoundError(f"load_adapter: {path}: expected a safetensors file, got {got}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {path}: expected a whole safetensors file, got: {error}") from error
    return tensors


def layers_by_key(linear: Iterable[str], experts: Iterable[str]) -> dict[str, str]:
    """{what a key of the file names in front of lora_A: the layer's name}.

    Args:
        linear: names of linear layers.
        experts: of the weights of fused experts that the adapter is on, all and in the model's order: PEFT wraps their
            module once for each, and only by the number of wrappers around it tells a file which is which.
    """
    found = {name: name for name in linear}
    within: dict[str, list[str]] = {}
    for name in experts:
        within.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in within.items():
        found |= {module + ".base_layer" * depth: name for depth, name in enumerate(reversed(names))}
    return found


def shape_in_file(layer: AnyLinear, part: str, r: int) -> tuple[int, int]:
    """Of lora_A or lora_B: [r, in] and [out, r], or of all experts [experts * r, in] and [out, r * experts]."""
    base = base_of(layer)
    if not isinstance(base, Stack4bit):
        size_out, size_in = out_and_in(layer)
        return (r, size_in) if part == "lora_A" else (size_out, r)
    experts, (size_in, size_out) = base.shape[0], base.sizes
    return (experts * r, size_in) if part == "lora_A" else (size_out, r * experts)


def to_file(part: str, factor: Tensor) -> Tensor:
    """lora_A or lora_B, whole, as the file has it."""
    if factor.dim() == 2:
        return factor
    return factor.flatten(0, 1) if part == "lora_A" else factor.permute(1, 2, 0).flatten(1, 2).contiguous()


def from_file(part: str, given: Tensor, like: Tensor) -> Tensor:
    """The inverse, in the shape of `like`."""
    if part == "lora_A" or like.dim() == 2:
        return given.reshape(like.shape)
    experts, size_out, r = like.shape
    return given.reshape(size_out, r, experts).permute(2, 0, 1)
