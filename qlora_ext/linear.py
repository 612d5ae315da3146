"""Linear4bit: a frozen linear layer whose weight is stored in 4 bits and decoded only inside the multiply.

Plain tensors, no tensor subclass; all metadata is on the module (described in README, "Storage format").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ext import functional
from qlora_ext._ops import ops
from qlora_ext.casts import keeping_dtype
from qlora_ext.dense_linear import dense_class, is_dense_linear, new_dense, oriented, out_and_in, stored_shape
from qlora_ext.layer_hooks import check_not_hooked, shallow_copy
from qlora_ext.quant_state import QuantState
from qlora_ext.quant_type import quant_type_of
from qlora_ext.sharded import check_before_fsdp


class Linear4bit(nn.Module):
    """`nn.Linear` with a frozen 4-bit weight: y = x W^T + bias, gradients for x and bias only.

    Args:
        in_features, out_features: of the weight [out, in].
        bias: whether there is one (trainable, in `dtype`).
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, a power of two from 32 to 4096.
        double_quant: absmax in 8 bits.
        dtype: float32, float16 or bfloat16, the dtype of the original weight; None: torch's default.
        device: of the parameters; on "meta" the layer holds none until a weight is loaded into it.

    Attributes:
        weight: frozen uint8 [out, in/2], or flat [ceil(out*in/2)] if in is no multiple of blocksize.
        absmax: frozen float32 [out, in/blocksize] (flat: [num_blocks]); uint8 with double quantization.
        nested_absmax, nested_offset: float32 buffers [ceil(num_blocks/256)] and 0-d, or None.
        bias: [out] or None.
        dense_class: nn.Linear, or transformers' Conv1D: the class that this layer has with a float weight.

    `load_state_dict` takes this layer's own tensors, or a float `weight`, as dense_class stores it, and quantizes it;
    until one of both is loaded the layer computes NaN. Another quant_type is refused: the metadata of a state_dict says
    it; without it (safetensors, a plain dict) the bytes tell it, of nearly all weights. With assign=True `dtype`
    becomes that of the float weight, or of the layer that was saved (without metadata: of its bias). A float cast
    (`.half()`, `.to(dtype)`) changes `dtype` and the bias; the scales stay float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, by name.
    """

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
        super().__init__()
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

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
    ) -> Linear4bit:
        """The 4-bit twin of a linear layer, on its device; the bias is shared, the linear layer left as it is.

        Args:
            linear: nn.Linear, or transformers' Conv1D, with a float32, float16 or bfloat16 weight (on "meta": the twin
                is on "meta" too).
            quant_type, blocksize, double_quant: as for `quantize_4bit`.

        Raises:
            TypeError: linear is of neither class, its weight's dtype is none of the three, or its bias is parametrized.
            ValueError: an unknown quant_type or blocksize, NaN or Inf in the weight, or hooks, which would be lost.
        """
        if not is_dense_linear(linear):
            raise TypeError(f"Linear4bit.from_linear: linear: expected an nn.Linear or Conv1D, got {type(linear)}")
        check_not_hooked("Linear4bit.from_linear", "linear", linear)
        size_out, size_in = out_and_in(linear)
        layer = cls(
            size_in,
            size_out,
            bias=False,
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            dtype=linear.weight.dtype,
            device="meta",
        )
        layer.dense_class = dense_class(linear)
        layer.quantize_(linear.weight)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def with_weight(self, weight: Tensor) -> Linear4bit:
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

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out] in its dtype."""
        y: Tensor = self._multiply(ops.linear_4bit.default, input)
        return y

    def forward_with_adapters(
        self,
        x: Tensor,
        A: list[Tensor],
        B: list[Tensor],
        scaling: list[float],
        keep: Sequence[float] = (),
        seed: Tensor | None = None,
    ) -> Tensor:
        """`forward(x) + sum_i scaling[i] * (dropout_i(x) @ A[i].T) @ B[i].T` as one op with its own backward.

        Args:
            x: as for `linear_4bit`.
            A, B: of each adapter, [r, in] and [out, r]; cast to x's dtype (or float32) inside.
            scaling: of each adapter; with dropout it holds the factor 1 / (1 - p) too.
            keep, seed: of the dropout before each adapter, if any: the probability that an element of x is kept, and an
                int64 seed, as a tensor of all of them on x's device; the backward pass draws the masks again from it.

        Returns:
            [..., out] in x's dtype (autocast: in autocast's), with gradients for x, bias, A and B. The backward pass
            needs x itself only if an A requires a gradient: else (LoRA-FA, arXiv 2308.03303) it is not kept.

        Raises:
            TypeError, ValueError: as `linear_4bit`.

        Source: LoRA, arXiv 2106.09685, section 4.1; QLoRA, arXiv 2305.14314, equation 5.
        """
        y: Tensor = self._multiply(ops.lora_linear_4bit.default, x, A, B, scaling, keep, seed)[0]
        return y

    def _multiply(self, op: Any, x: Tensor, *more: Any) -> Any:
        """The op on x and the weight. No QuantState is made: it costs as much time as one row of a small layer."""
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.in_features,) or x.dtype is torch.uint8:
            name = op.name().removeprefix("qlora_ext::")
            functional.check_matrix(name, self.state, x)  # says what is wrong with x, if it is not this:
            why = "; a model that casts to a layer's weight.dtype needs the layer in quantize_model's skip"
            raise TypeError(f"{name}: x: expected dtype float32, float16 or bfloat16, got {x.dtype}{why}")
        x = functional.cast_as_autocast(x)
        return op(x, *self._tensors(), self.quant_type, self.blocksize, self.out_features, self.bias, *more)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in `dtype` (None: self.dtype); TypeError if it is no float32, float16 or bfloat16."""
        return functional.dequantize_4bit(self.weight, self.state, dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        )

    def _quantize(self, weight: Tensor) -> tuple[Tensor, QuantState]:
        return functional.quantize_4bit(
            weight, quant_type=self.quant_type, blocksize=self.blocksize, double_quant=self.double_quant
        )

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
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


def dense(layer: nn.Linear | Linear4bit, weight: Tensor) -> nn.Linear:
    """The layer with this float weight [out, in], frozen, in its dtype; a 4-bit or parametrized one as what it was."""
    kind, dtype = dense_class(layer), layer.dtype if isinstance(layer, Linear4bit) else layer.weight.dtype
    if not isinstance(layer, Linear4bit) and "weight" in layer._parameters:
        linear = shallow_copy(layer)  # a subclass may compute in its own way
    else:
        linear = new_dense(kind, *out_and_in(layer), layer.bias).train(layer.training)
    linear.weight = nn.Parameter(oriented(kind, weight).to(dtype).contiguous(), requires_grad=False)
    return linear
