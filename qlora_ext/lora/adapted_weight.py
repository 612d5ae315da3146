"""What `LoraLinear.weight` is over a base whose weight is no floats: models that read it mostly ask for its dtype,
before they cast x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

FORM = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "numel", "layout"}) | {
    *("is_floating_point", "is_cuda", "is_cpu", "is_meta"),
}


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
        for given in pytree.tree_leaves((args, kwargs)):
            if isinstance(given, cls):
                if _name(func) in FORM:
                    return func(given._base.weight)
                raise given._error(_name(func))
        return NotImplemented  # in a container of another kind

    def _error(self, name: str) -> AttributeError:
        expected = "a base_layer with a float weight (as quantize_model(skip=...) leaves it)"
        got = self.__dict__.get("_base")
        layer = self.__dict__.get("_layer")
        return AttributeError(f"LoraLinear: weight.{name}: expected {expected}, got {got}", name=name, obj=layer)


def _name(func: Any) -> str:
    """Of a function of torch; of a getter, the attribute's."""
    return getattr(func.__self__ if func.__name__ == "__get__" else func, "__name__", "attribute")


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: WeightInBits, *_: object) -> Any:
        raise self._error(name)

    return refuse


_BINARY = ("add", "sub", "mul", "matmul", "truediv")
for _operator in ("getitem", "setitem", "iter", "len", "neg", *_BINARY, *(f"r{name}" for name in _BINARY)):
    setattr(WeightInBits, f"__{_operator}__", _refusal(f"__{_operator}__"))
