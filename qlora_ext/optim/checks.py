"""Options, groups and parameters of PagedAdamW, checked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qlora_ext import _C
from qlora_ext.sharded import local_shard

Hyper = tuple[float, float, float, float, float, bool]  # lr, beta1, beta2, eps, weight_decay, maximize

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_PAGE_BYTES = 1 << 30


def _is_path(text: str) -> bool:
    return text != "" and not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


# Options of the optimizer as a whole: their types, what is expected, and whether a value of these types is that.
_Option = tuple[tuple[type, ...], str, Callable[[Any], bool]]
_BUDGET: _Option = (
    (int, type(None)),
    "a number of bytes, 0 or more, or None",
    lambda given: given is None or 0 <= given < 1 << 63,
)
_OPTIONS: dict[str, _Option] = {
    "state_bits": ((Integral,), "8 or 32", lambda given: given in (8, 32)),
    "page_bytes": (
        (int,),
        f"a multiple of {_C.MIN_PAGE_BYTES} from {_C.MIN_PAGE_BYTES} to {_MAX_PAGE_BYTES}",
        lambda given: 0 < given <= _MAX_PAGE_BYTES and given % _C.MIN_PAGE_BYTES == 0,
    ),
    "device_budget": _BUDGET,
    "host_budget": _BUDGET,
    "page_file": (
        (str, bytes, os.PathLike, type(None)),
        "a path or None",
        lambda given: given is None or _is_path(os.fsdecode(given)),
    ),
    "stochastic_rounding": ((bool,), "a bool", lambda given: True),
    "seed": ((int,), "an integer from 0 to 2**64 - 1", lambda given: 0 <= given < 1 << 64),
}


def check(condition: bool, what: str, expected: object, got: object, error: type[Exception] = ValueError) -> None:
    """Raises the error if the condition does not hold."""
    if not condition:
        raise error(f"PagedAdamW: {what}: expected {expected}, got {got!r}")


def check_dtype(what: str, dtype: torch.dtype) -> None:
    """Raises TypeError if it is no dtype of parameters and gradients."""
    check(dtype in _DTYPES, what, "dtype float32, float16 or bfloat16", dtype, TypeError)


def check_parameter(what: str, p: Tensor) -> None:
    """Raises TypeError or ValueError if it has no dtype of parameters, or its elements do not lie in memory."""
    check(not is_lazy(p), what, "parameters with values", "one of a lazy module that has not run")
    check_dtype(what, p.dtype)
    in_memory(what, local_shard(p))


def in_memory(what: str, tensor: Any) -> Tensor:
    """The tensor itself, or what a collective that is under way gives."""
    kind = type(tensor).__name__
    check(not isinstance(tensor, FakeTensor), what, "a tensor with values", kind, TypeError)
    wrapped = is_traceable_wrapper_subclass(tensor)
    check(not wrapped or hasattr(tensor, "wait"), what, "plain tensors or DTensors of them", kind, TypeError)
    plain: Tensor = tensor.wait() if wrapped else tensor
    return plain


def check_options(**options: Any) -> None:
    """Raises TypeError or ValueError if one of these options of the optimizer as a whole is not what it has to be."""
    for name, given in options.items():
        types, expected, valid = _OPTIONS[name]
        has_type = isinstance(given, types) and (bool in types or not isinstance(given, bool))
        check(has_type, name, expected, given, TypeError)
        check(valid(given), name, expected, given)


def parameters(groups: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Those of all parameter groups, in order."""
    return (p for group in groups for p in group["params"])


def checked_hyper(group: dict[str, Any], *, new: bool = False) -> Hyper:
    """The hyperparameters of a group. Later on, schedules may go below 0, as LinearLR does by rounding."""
    missing = [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]
    check(not missing, "param_groups", "groups of AdamW", f"one without {', '.join(missing)}")
    foreign = [name for name in _OPTIONS if name in group]
    check(not foreign, "param_groups", "options of a group", f"{', '.join(foreign)} of the whole optimizer")
    for name in ("amsgrad", "differentiable"):
        check(not group.get(name), name, "False", group.get(name))
    lr, eps, weight_decay = (_number(name, group[name]) for name in ("lr", "eps", "weight_decay"))
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        check(value >= 0 or (not new and math.isfinite(value)), name, "0 or more", value)
    check(eps >= 0, "eps", "0 or more", eps)
    decoupled = group.get("decoupled_weight_decay", True)  # False: a group of torch.optim.Adam
    check(decoupled or weight_decay == 0, "decoupled_weight_decay", "True, or weight_decay 0", decoupled)
    betas, two = group["betas"], "two numbers from 0 to below 1"
    check(isinstance(betas, Iterable) and not isinstance(betas, Iterator), "betas", two, betas, TypeError)
    both = [_number("betas", beta) for beta in betas]
    check(len(both) == 2 and all(0 <= beta < 1 for beta in both), "betas", two, betas)
    maximize = group.get("maximize")
    is_bool = not isinstance(maximize, Tensor) and maximize in (None, False, True)
    check(is_bool, "maximize", "a bool", maximize, TypeError)
    return lr, both[0], both[1], eps, weight_decay, bool(maximize)


def _number(what: str, given: Any) -> float:
    """As a float, what can be one, like a tensor of one element; but no str."""
    try:
        return math.fsum((given,))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"PagedAdamW: {what}: expected a number, got {given!r}") from error
