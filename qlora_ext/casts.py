"""Casts of modules, which leave some of their tensors as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor


def keeping_dtype(fn: Callable[[Tensor], Tensor], kept: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """What nn.Module._apply should call so that the tensors `kept` follow a move to another device but not a cast."""
    ids = {id(each) for tensor in kept for each in (tensor, tensor.grad) if each is not None}

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if id(tensor) in ids and moved.dtype != tensor.dtype else moved

    return apply
