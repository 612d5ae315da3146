"""DTensors: parameters of which each process has a part, as FSDP2 (fully_shard) and tensor parallelism make them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _is_dtensor(tensor: Tensor | None) -> bool:
    # DTensor's module takes a second to import.
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, for which all its processes must call this; any other tensor itself."""
    whole: Any = tensor
    return whole.full_tensor() if _is_dtensor(tensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, of a DTensor into the parts; all its processes must call this."""
    into: Any = parameter
    if _is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.detach().to(into.dtype), into.device_mesh, into.placements)
    into.copy_(value)


def reshard(model: nn.Module) -> None:
    """Give FSDP2's layers their DTensors: after a forward some still have the whole, and what is written there is lost.

    It keeps nothing of either: the next forward gathers again.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it there are no such layers
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def check_whole(op: str, layers: Mapping[str, Any], instead: str = "add adapters before fully_shard") -> None:
    """Raise ValueError, which says what to do instead, if one of these layers has its weight in parts."""
    for name, layer in layers.items():
        if _is_dtensor(getattr(getattr(layer, "base_layer", layer), "weight", None)):
            expected = f"a layer whose weight is whole ({instead})"
            raise ValueError(f"{op}: model: {name}: expected {expected}, got a DTensor")
