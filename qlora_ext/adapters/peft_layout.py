"""Where PEFT's file has the factors of a layer, under which key and in which shape."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from qlora_ext.dense_linear import out_and_in
from qlora_ext.experts import Stack4bit
from qlora_ext.lora.linear import base_of
from qlora_ext.model_layers import AnyLinear


def owners(linear: Iterable[str], experts: Iterable[str]) -> dict[str, str]:
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
    stack = _stack(layer)
    if stack is None:
        size_out, size_in = out_and_in(layer)
        return (r, size_in) if part == "lora_A" else (size_out, r)
    experts, (size_in, size_out) = stack.shape[0], stack.sizes
    return (experts * r, size_in) if part == "lora_A" else (size_out, r * experts)


def to_file(part: str, factor: Tensor) -> Tensor:
    """lora_A or lora_B, whole, as the file has it."""
    if factor.dim() == 2:
        return factor
    return factor.flatten(0, 1) if part == "lora_A" else factor.permute(1, 2, 0).flatten(1, 2).contiguous()


def from_file(layer: AnyLinear, part: str, given: Tensor) -> Tensor:
    """The inverse, of a tensor of the right shape."""
    stack = _stack(layer)
    if stack is None:
        return given
    experts, (rows, columns) = stack.shape[0], given.shape
    if part == "lora_A":
        return given.reshape(experts, -1, columns)
    return given.reshape(rows, -1, experts).permute(2, 0, 1)


def _stack(layer: AnyLinear) -> Stack4bit | None:
    base = base_of(layer)
    return base if isinstance(base, Stack4bit) else None
