"""Layers that do more than their class says: what hooks they have, and copies without what belongs to the original."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def has_other_forward(module: nn.Module) -> bool:
    """Whether it has a forward in the place of its class's, as accelerate's hooks give it.

    When they are removed they leave the class's own there, bound to the module.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    return getattr(forward, "__self__", None) is not module or forward.__func__ is not type(module).forward


def is_hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: hooks, be it fully_shard's, or a forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or has_other_forward(module)


def check_not_hooked(op: str, what: str, module: nn.Module) -> None:
    """Raise ValueError if it is_hooked."""
    if is_hooked(module):
        got = f"a layer that has them{of_accelerate(module)}"
        raise ValueError(f"{op}: {what}: expected no hooks, and its class's forward, got {got}")


def of_accelerate(module: nn.Module) -> str:
    """Behind the words for hooks or a forward: that they are accelerate's, if they are, and what takes them off."""
    remedy = "accelerate.hooks.remove_hook_from_submodules(model) takes them off"
    return f", accelerate's ({remedy})" if hasattr(module, "_hf_hook") else ""


def check_not_offloaded(op: str, model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if parameters of a layer are kept elsewhere, and accelerate's hooks on it, or on a module that
    it is in, know which."""
    hooked = {id(part) for module in model.modules() if has_other_forward(module) for part in module.modules()}
    for name, layer in layers:
        if any(id(part) in hooked and any(t.is_meta for t in part.parameters(False)) for part in layer.modules()):
            expected = "a layer in memory (add, delete and merge adapters before accelerate's dispatch or offload)"
            raise ValueError(f"{op}: model: {name}: expected {expected}, got one on meta with accelerate's hook")


def shallow_copy(layer: Module) -> Module:
    """A copy that shares the tensors and hooks, with tables of its own to put other tensors into."""
    twin = copy.copy(layer)
    twin._parameters = layer._parameters.copy()
    twin._buffers = layer._buffers.copy()
    twin.__dict__.pop("forward", None)  # bound to the original, with whose tensors it computes
    return twin


def with_bias_of(layer: nn.Module, other: Module) -> Module:
    """`other`, or a copy of it, with the bias that `layer` has now, as inside torch.func.functional_call."""
    bias, own = layer._parameters.get("bias"), other._parameters.get("bias")
    if bias is own or "bias" not in layer._parameters:
        return other
    if bias is not None and bias.is_meta and own is not None:  # offloaded
        return other
    twin = shallow_copy(other)
    twin._parameters["bias"] = bias
    return twin
