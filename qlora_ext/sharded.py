"""DTensors: parameters of which each process has a part, as FSDP2 (fully_shard) and tensor parallelism make them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor, perhaps a whole one."""
    return hasattr(tensor, "full_tensor")  # DTensor's module takes a second to import


def placements(tensor: Any) -> tuple[Any, ...] | None:
    """How a DTensor lies on each dimension of its mesh; None of any other tensor."""
    return tensor.placements if is_dtensor(tensor) else None


def local_shard(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    whole: Any = tensor
    local: Tensor = whole.to_local()
    return local.wait() if hasattr(local, "wait") else local  # for a collective that is under way


def is_sharded(p: Any) -> bool:
    """Whether p is a DTensor of which this process has a part only."""
    placed = zip(p.placements, p.device_mesh.shape, strict=True) if is_dtensor(p) else ()
    return any(size > 1 and not placement.is_replicate() for placement, size in placed)


def shard_number(p: Any) -> int:
    """Which of p's shards this process has, the same on all that have it; 0 if p is no DTensor."""
    coordinate = p.device_mesh.get_coordinate() if is_dtensor(p) else None  # None: has none of them
    number = 0
    if coordinate is not None:
        for placement, size, at in zip(p.placements, p.device_mesh.shape, coordinate, strict=True):
            if not placement.is_replicate():
                number = number * size + at
    return number


def like_parameter(p: Any, state: Tensor) -> Tensor:
    """The state of the local shard of p, as a DTensor if p is one."""
    if not is_dtensor(p):
        return state
    from torch.distributed.tensor import DTensor

    stride = torch.empty(p.shape, device="meta").stride()
    return DTensor.from_local(state, p.device_mesh, p.placements, shape=p.shape, stride=stride)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, for which all its processes must call this; any other tensor itself."""
    whole: Any = tensor
    return whole.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, of a DTensor into the parts; all its processes must call this."""
    into: Any = parameter
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.detach().to(into.dtype), into.device_mesh, into.placements)
    into.copy_(value)


def reshard(model: nn.Module) -> None:
    """Give FSDP2's layers their DTensors: after a forward some still have the whole, and what is written there is lost.

    It keeps nothing of either: the next forward gathers again.
    """
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # without it there are no such layers
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def check_whole(op: str, layers: Mapping[str, Any], instead: str = "add adapters before fully_shard") -> None:
    """Raise ValueError, which says what to do instead, if one of these layers has its weight, or adapters, in parts."""
    for name, layer in layers.items():
        for each in layer.parameters():
            check_weight_is_whole(f"{op}: model: {name}", each, instead)


def check_before_fsdp(what: str, module: nn.Module) -> None:
    """Raise ValueError if fully_shard keeps the parameters of this module, though they may be whole after a forward."""
    hooks = (getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values())
    of_fsdp = any(str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp") for hook in hooks)
    if of_fsdp or any(map(is_dtensor, module.parameters(recurse=False))):
        raise ValueError(f"{what}: expected a float weight before fully_shard, got one after it")


def check_weight_is_whole(where: str, weight: object, instead: str) -> None:
    """Raise ValueError, which says what to do instead, if this weight of a layer is in parts."""
    if is_dtensor(weight):
        raise ValueError(f"{where}: expected a layer whose weight is whole ({instead}), got a DTensor")
