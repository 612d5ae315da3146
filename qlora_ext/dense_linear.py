"""Linear layers with a float weight: nn.Linear, which stores it as [out, in], and transformers' Conv1D (GPT-2's), as
[in, out]."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qlora_ext.sharded import is_dtensor


def conv1d_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """transformers' Conv1D, which is not imported here, if this class is it or a subclass, as fully_shard makes one."""
    return of_transformers(kind, "Conv1D")


def falcon_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """transformers' FalconLinear, likewise: nn.Linear, but that it rounds the product before it adds a bias."""
    return of_transformers(kind, "FalconLinear")


def bitsandbytes_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """bitsandbytes' Linear4bit or Linear8bitLt, likewise: nn.Linear, but that it stores its weight in its own form."""
    return _of_package(kind, "bitsandbytes", "Linear4bit", "Linear8bitLt")


def of_transformers(kind: type, name: str) -> type | None:
    """transformers' class of this name, if this class is it or a subclass."""
    return _of_package(kind, "transformers", name)


def _of_package(kind: type, package: str, *names: str) -> type | None:
    return next((k for k in kind.__mro__ if k.__name__ in names and k.__module__.startswith(f"{package}.")), None)


def is_dense_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an nn.Linear or a Conv1D, not one in 4 bits; to the type checker a Conv1D is an nn.Linear, too."""
    if hasattr(type(module), "dense_class"):  # Linear4bit, an nn.Linear to others
        return False
    return isinstance(module, nn.Linear) or conv1d_class(type(module)) is not None


def dense_class(layer: nn.Module) -> type[nn.Module]:
    """nn.Linear or Conv1D: what a linear layer is; of one in 4 bits, what it was."""
    return getattr(layer, "dense_class", None) or conv1d_class(type(layer)) or nn.Linear


def computes_otherwise(layer: nn.Module) -> bool:
    """Whether it is a subclass of nn.Linear or Conv1D that may return anything, as routers of experts do."""
    known = dense_class(layer), falcon_class(type(layer)), bitsandbytes_class(type(layer))
    return is_dense_linear(layer) and all(type(layer).forward is not kind.forward for kind in known if kind)


def oriented(kind: type[nn.Module], weight: Tensor) -> Tensor:
    """A weight [out, in] as nn.Linear or Conv1D, whichever `kind` is, stores it, and the other way round."""
    return weight if kind is nn.Linear else weight.T


def stored_shape(kind: type[nn.Module], size_out: int, size_in: int) -> list[int]:
    """The shape of a weight [out, in] as `kind`, nn.Linear or Conv1D, stores it."""
    return [size_out, size_in] if kind is nn.Linear else [size_in, size_out]


def out_and_in(layer: nn.Module) -> tuple[int, int]:
    """out_features and in_features of a linear layer of any kind."""
    sizes: Any = layer
    return (sizes.nf, sizes.nx) if conv1d_class(type(layer)) else (sizes.out_features, sizes.in_features)


def has_float_weight(layer: nn.Linear) -> bool:
    """Whether its weight is a plain one, not one of bitsandbytes' or torchao's."""
    weight = layer.weight
    if is_traceable_wrapper_subclass(weight) and not is_dtensor(weight):  # torchao's
        return False
    return weight.is_floating_point() and list(weight.shape) == stored_shape(dense_class(layer), *out_and_in(layer))


def new_dense(kind: type[nn.Module], size_out: int, size_in: int, bias: nn.Parameter | None) -> nn.Linear:
    """An nn.Linear or Conv1D, whichever `kind` is, without a weight yet."""
    with torch.device("meta"):
        layer: Any = nn.Linear(size_in, size_out, bias=False) if kind is nn.Linear else kind(size_out, size_in)
    layer.register_parameter("bias", bias)
    return layer  # type: ignore[no-any-return]
