"""What a step of PagedAdamW takes from its groups and parameters, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_ext.optim_state import local_shard

Hyper = tuple[float, float, float, float, float, bool]  # lr, beta1, beta2, eps, weight_decay, maximize

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(condition: bool, what: str, expected: object, got: object) -> None:
    """Raises ValueError if the condition does not hold."""
    if not condition:
        raise refusal(what, expected, got)


def refusal(what: str, expected: object, got: object) -> ValueError:
    """What `check` raises. What is checked of every parameter at every step raises it itself: `check` would have the
    message made even where all is well."""
    return ValueError(f"PagedAdamW: {what}: expected {expected}, got {got!r}")


def check_dtype(what: str, dtype: torch.dtype) -> None:
    """Raises TypeError if it is no dtype of parameters and gradients."""
    if dtype not in _DTYPES:
        raise TypeError(f"PagedAdamW: {what}: expected dtype float32, float16 or bfloat16, got {dtype}")


def checked_hyper(group: dict[str, Any]) -> Hyper:
    """The hyperparameters of a group."""
    missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
    check(not missing, "param_groups", "groups of AdamW", f"one without {', '.join(missing)}")
    check(not group.get("amsgrad"), "amsgrad", "False", group.get("amsgrad"))
    lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check(value >= 0, name, "0 or more", value)
    check(0 <= beta1 < 1 and 0 <= beta2 < 1, "betas", "two numbers from 0 to below 1", group["betas"])
    return lr, beta1, beta2, eps, weight_decay, bool(group.get("maximize"))


def checked_gradient(index: int, p: Any) -> Tensor:
    """The gradient of p, which is parameter number `index`: of its local shard, contiguous."""
    grad: Tensor = p.grad
    what = f"gradient of parameter {index}"
    if grad.layout is not torch.strided:
        raise refusal(what, "a dense tensor", grad.layout)
    check_dtype(what, grad.dtype)
    if grad.shape != p.shape:
        raise refusal(what, f"shape {list(p.shape)}", list(grad.shape))
    if not p.is_contiguous() and any(stride == 0 and n > 1 for stride, n in zip(p.stride(), p.shape, strict=True)):
        raise refusal(f"parameter {index}", "elements of their own", f"expanded ones (strides {p.stride()})")
    if hasattr(p, "placements") or hasattr(grad, "placements"):
        grad = _local_gradient(what, p, grad)
    return grad.contiguous()


def _local_gradient(what: str, p: Any, grad: Any) -> Tensor:
    """Of the shard that this process has of p, a DTensor."""
    if hasattr(p, "placements") != hasattr(grad, "placements"):
        raise TypeError(f"PagedAdamW: {what}: expected {type(p.data).__name__}, got {type(grad).__name__}")
    if grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    local, expected_shape = local_shard(grad), list(local_shard(p).shape)
    check(list(local.shape) == expected_shape, what, f"a local shard of shape {expected_shape}", list(local.shape))
    return local
