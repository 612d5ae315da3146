"""Linear layers with a float weight: nn.Linear, which stores it as [out, in], and transformers' Conv1D (GPT-2's), as
[in, out]."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether this class is transformers' Conv1D, which is not imported here."""
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_dense_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is one of both; to the type checker Conv1D is an nn.Linear."""
    return isinstance(module, nn.Linear) or is_conv1d(type(module))


def dense_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a linear layer; of one in 4 bits, of the layer that it was."""
    return getattr(layer, "dense_class", type(layer))


def oriented(kind: type[nn.Module], weight: Tensor) -> Tensor:
    """A weight [out, in] as this class stores it, and the other way round."""
    return weight.T if is_conv1d(kind) else weight


def stored_shape(kind: type[nn.Module], size_out: int, size_in: int) -> list[int]:
    """Of a weight [out, in] as this class stores it."""
    return [size_in, size_out] if is_conv1d(kind) else [size_out, size_in]


def out_and_in(layer: nn.Module) -> tuple[int, int]:
    """out_features and in_features of a linear layer of any kind."""
    sizes: Any = layer
    return (sizes.nf, sizes.nx) if is_conv1d(type(layer)) else (sizes.out_features, sizes.in_features)


def has_float_weight(layer: nn.Linear) -> bool:
    """Whether its weight is a plain one, not one of bitsandbytes' or torchao's."""
    weight = layer.weight
    return weight.is_floating_point() and list(weight.shape) == stored_shape(type(layer), *out_and_in(layer))


def new_dense(kind: type[nn.Module], size_out: int, size_in: int, bias: nn.Parameter | None) -> nn.Linear:
    """A layer of this class, of both, without a weight yet."""
    layer: Any = kind(size_out, size_in) if is_conv1d(kind) else nn.Linear(size_in, size_out, bias=False, device="meta")
    layer.register_parameter("bias", bias)
    return layer  # type: ignore[no-any-return]
