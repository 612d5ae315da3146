"""What a step of PagedAdamW updates: parameters and their gradients, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_ext import _C
from qlora_ext.optim.checks import Hyper, check, check_dtype, checked_hyper, in_memory, parameters
from qlora_ext.sharded import is_dtensor, local_shard, shard_number


class Update(NamedTuple):
    """One parameter of a step: its local shard, the gradient of that, and its number for rounding by chance."""

    parameter: Tensor
    local: Tensor
    grad: Tensor
    number: int
    hyper: Hyper


def update_of(p: Tensor, grad: Tensor, index: int, hyper: Hyper) -> Update:
    """The update of p, parameter number `index` of its optimizer. Each shard has a number of its own."""
    return Update(p, local_shard(p), grad, index + (shard_number(p) << 32), hyper)


def checked_updates(param_groups: Sequence[dict[str, Any]]) -> Iterator[Update]:
    """One for each parameter that has a gradient."""
    params = list(parameters(param_groups))
    hypers = (hyper for group in param_groups for hyper in [checked_hyper(group)] * len(group["params"]))
    for index, (p, grad, hyper) in enumerate(zip(params, _C.plain_gradients(params), hypers, strict=True)):
        if grad is not None:
            yield Update(p, p, grad, index, hyper)
        elif p.grad is not None:
            yield update_of(p, _checked_gradient(index, p), index, hyper)


def _checked_gradient(index: int, p: Any) -> Tensor:
    """The gradient of p, which is parameter number `index`: of its local shard."""
    grad: Tensor = p.grad
    what = f"gradient of parameter {index}"
    check(grad.layout is torch.strided, what, "a dense tensor", grad.layout)
    check_dtype(what, grad.dtype)
    check(grad.shape == p.shape, what, f"shape {list(p.shape)}", list(grad.shape))
    expanded = p.numel() > 0 and any(stride == 0 and n > 1 for stride, n in zip(p.stride(), p.shape, strict=True))
    check(not expanded, f"parameter {index}", "elements of their own", f"expanded ones (strides {p.stride()})")
    if is_dtensor(p) or is_dtensor(grad):
        grad = _local_gradient(what, p, grad)
    return in_memory(what, grad)


def _local_gradient(what: str, p: Any, grad: Any) -> Tensor:
    """Of the shard that this process has of p, a DTensor."""
    if is_dtensor(p) != is_dtensor(grad):
        raise TypeError(f"PagedAdamW: {what}: expected {type(p.data).__name__}, got {type(grad).__name__}")
    if grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    local, expected_shape = local_shard(grad), list(local_shard(p).shape)
    check(list(local.shape) == expected_shape, what, f"a local shard of shape {expected_shape}", list(local.shape))
    return local
