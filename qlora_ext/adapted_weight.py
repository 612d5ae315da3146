"""What `LoraLinear.weight` is to a model that reads it: most ask for dtype or shape, and compute nothing with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FORM = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "layout"}) | {
    *("is_floating_point", "is_cuda", "is_cpu", "is_meta"),
}


class UpdatedWeight(Tensor):
    """W0 + the updates of adapters, which are added when something computes with it, once."""

    value: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, W0: Tensor, compute: Callable[[], Tensor]) -> UpdatedWeight:
        make: Any = Tensor._make_wrapper_subclass
        made: UpdatedWeight = make(cls, W0.shape, dtype=W0.dtype, device=W0.device)
        made.value = cache(torch.set_grad_enabled(torch.is_grad_enabled())(compute))
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name(func) in FORM:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunctionSubclass():  # to read what it has of its own
            args, kwargs = pytree.tree_map_only(cls, lambda weight: weight.value(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise TypeError(f"LoraLinear: weight: expected Python code to compute with it, got {func} called from C++")


class WeightInBits:
    """Of a weight that is no floats [out, in]: nothing can compute with it, or change it."""

    def __init__(self, layer: nn.Module, base: nn.Module) -> None:
        self.__dict__.update(_layer=layer, _base=base)

    def __getattr__(self, name: str) -> Any:
        if name in FORM or name == "requires_grad":
            return getattr(self._base.weight, name)
        raise self._error(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "requires_grad" or value:  # to freeze what is frozen is nothing
            raise self._error(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if _name(func) in FORM:
            return func(given._base.weight)
        raise given._error(_name(func))

    def _error(self, name: str) -> AttributeError:
        expected = "a base_layer with a float weight (as quantize_model(skip=...) leaves it)"
        got = self.__dict__.get("_base")
        layer = self.__dict__.get("_layer")
        return AttributeError(f"LoraLinear: weight.{name}: expected {expected}, got {got}", name=name, obj=layer)


def _name(func: Any) -> str:
    """Of a function of torch; of a getter, the attribute's."""
    name: str = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
    return name


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: WeightInBits, *_: object) -> Any:
        raise self._error(name)

    return refuse


for _operator in ("getitem", "setitem", "iter", "len", "neg", "add", "sub", "mul", "matmul", "truediv"):
    for _method in (f"__{_operator}__", f"__r{_operator}__"):
        setattr(WeightInBits, _method, _refusal(_method))
