"""Weight4bit: the 4-bit storage of a weight as a module, which Linear4bit and the experts' Stack4bit are made of.

Plain tensors, no tensor subclass; all metadata is on the module (described in README, "Storage format").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlora_ext import functional
from qlora_ext.casts import keeping_dtype
from qlora_ext.dense_linear import oriented, stored_shape
from qlora_ext.layer_hooks import shallow_copy
from qlora_ext.quant_state import QuantState
from qlora_ext.quant_type import quant_type_of
from qlora_ext.sharded import check_before_fsdp

Self = TypeVar("Self", bound="Weight4bit")


class Weight4bit(nn.Module):
    """A frozen weight [out, in] in 4 bits; arguments, attributes and errors as `Linear4bit` describes them."""

    weight: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    bias: nn.Parameter | None
    dense_class: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a float weight
        self.in_features = in_features
        self.out_features = out_features
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.dtype = dtype or torch.get_default_dtype()
        # The kernel's own checks, on no elements: on meta no kernel runs that could complain.
        self._quantize(torch.empty(0, dtype=self.dtype, device="cpu"))
        # NaN until a weight is loaded: accelerate, unless told to, does not load the buffers of what it puts on disk.
        self._set(
            *self._quantize(torch.empty(out_features, in_features, dtype=self.dtype, device="meta")),
            lambda t: torch.full(t.shape, math.nan if t.is_floating_point() else 0, dtype=t.dtype, device=device),
        )
        self.register_parameter("bias", None)  # else None would be a plain attribute, in the way of a later one
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype, device=device))

    def with_weight(self: Self, weight: Tensor) -> Self:
        """A layer of the same kind, options and bias that holds `weight`, as for `quantize_`, in 4 bits."""
        layer = shallow_copy(self)  # shares the bias
        layer.quantize_(weight)
        return layer

    def quantize_(self, weight: Tensor) -> None:
        """Replace the weight by the 4-bit form of `weight`, a float tensor [out, in], on that tensor's device.

        For a Conv1D it is [in, out]: a layer's float weights are always as its dense_class stores them.

        Raises:
            ValueError: another shape, or NaN or Inf in it.
            TypeError: another dtype than float32, float16 or bfloat16.
        """
        expected = stored_shape(self.dense_class, self.out_features, self.in_features)
        if list(weight.shape) != expected:
            raise ValueError(f"Linear4bit: weight: expected shape {expected}, got {list(weight.shape)}")
        with torch.inference_mode(False):  # autograd saves no inference tensor, not even a frozen one
            self._set(*self._quantize(oriented(self.dense_class, weight)))

    @property
    def state(self) -> QuantState:
        """The QuantState of the weight, over the layer's own tensors."""
        shape = torch.Size((self.out_features, self.in_features))
        return QuantState(shape, self.dtype, self.quant_type, self.blocksize, *self._tensors()[1:])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in `dtype` (None: self.dtype); TypeError if it is no float32, float16 or bfloat16."""
        return functional.dequantize_4bit(self.weight, self.state, dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `quantize_4bit`."""
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.double_quant}

    def _quantize(self, weight: Tensor) -> tuple[Tensor, QuantState]:
        return functional.quantize_4bit(weight, **self.options)

    def _set(self, packed: Tensor, state: QuantState, make: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        """Hold make(tensor) of each tensor of a 4-bit weight."""
        self.weight = nn.Parameter(make(packed), requires_grad=False)
        self.absmax = nn.Parameter(make(state.absmax), requires_grad=False)
        for name in ("nested_absmax", "nested_offset"):
            tensor = getattr(state, name)
            self.register_buffer(name, None if tensor is None else make(tensor))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """weight, absmax, nested_absmax and nested_offset."""
        parameters: dict[str, Any] = self._parameters
        buffers = self._buffers
        try:  # nn.Module's own lookup of four attributes takes longer than all else around the op
            return parameters["weight"], parameters["absmax"], buffers["nested_absmax"], buffers["nested_offset"]
        except KeyError:  # FSDP and parametrizations keep them elsewhere
            if "weight_orig" in self._parameters:
                raise TypeError(
                    "Linear4bit: weight: expected codes, got those that torch.nn.utils.prune masks"
                ) from None
            return self.weight, self.absmax, self.nested_absmax, self.nested_offset

    def _storage(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by name."""
        names = ("weight", "absmax", "nested_absmax", "nested_offset")
        return {name: t for name, t in zip(names, self._tensors(), strict=True) if t is not None}

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(keeping_dtype(fn, self._storage().values()), recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] |= {"quant_type": self.quant_type, "dtype": self.dtype}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if prefix + "weight.absmax" in state_dict:
            wanted = "the original model's float weight, or this layer's own tensors"
            raise ValueError(f"Linear4bit: {prefix}weight: expected {wanted}, got a bitsandbytes checkpoint's")
        weight, dtype = state_dict.get(prefix + "weight"), self.dtype
        if isinstance(weight, Tensor) and weight.is_floating_point():
            check_before_fsdp(f"Linear4bit: {prefix}weight", self)
            try:
                self.quantize_(weight if self.weight.is_meta else weight.to(self.weight.device))
            except (TypeError, ValueError) as error:
                why = str(error).removeprefix("Linear4bit: weight: ")
                raise type(error)(f"Linear4bit: {prefix}weight: {why}") from error
            # The scales were made here: to the rest of the loading they are neither missing nor different.
            state_dict = dict(state_dict) | {prefix + name: own for name, own in self._storage().items()}
            dtype = weight.dtype
        else:
            self._check_stored(state_dict, prefix, local_metadata)
            if isinstance(weight, Tensor):
                bias = state_dict.get(prefix + "bias")
                dtype = local_metadata.get("dtype", bias.dtype if isinstance(bias, Tensor) else dtype)
        if local_metadata.get("assign_to_params_buffers"):  # nn.Linear's weight has the given dtype then, too
            self.dtype = dtype
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _check_stored(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        """That what there is of a 4-bit weight, perhaps not all of it, is of this layer's kind."""
        at = f"Linear4bit: {prefix}"
        for name, own in self._storage().items():
            if not isinstance(given := state_dict.get(prefix + name), Tensor):
                continue  # missing: torch reports it
            if given.dtype != own.dtype:  # torch would cast
                raise TypeError(f"{at}{name}: expected dtype {own.dtype}, got {given.dtype}")
            if given.shape != own.shape:
                raise ValueError(f"{at}{name}: expected shape {list(own.shape)}, got {list(given.shape)}")
        if isinstance(weight := state_dict.get(prefix + "weight"), Tensor):
            other = local_metadata.get("quant_type") or quant_type_of(weight, self.blocksize) or self.quant_type
            if other != self.quant_type:
                how = "" if "quant_type" in local_metadata else ", by its codes"
                raise ValueError(f"{at}weight: expected quant_type {self.quant_type!r}, got {other!r}{how}")
