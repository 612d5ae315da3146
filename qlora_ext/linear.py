"""Linear4bit: a frozen linear layer whose weight is stored in 4 bits and decoded only inside the multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ext import functional
from qlora_ext._ops import ops
from qlora_ext.dense_linear import dense_class, is_dense_linear, new_dense, oriented, out_and_in
from qlora_ext.layer_hooks import check_not_hooked, shallow_copy
from qlora_ext.weight_4bit import Weight4bit


class Linear4bit(Weight4bit, nn.Linear):  # type: ignore[misc]  # a Parameter, or no bias, is narrower
    """`nn.Linear` with a frozen 4-bit weight: y = x W^T + bias, gradients for x and bias only.

    It is an nn.Linear to all that looks for linear layers; what its `weight` holds are codes, not floats.

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

    def reset_parameters(self) -> None:
        """nn.Linear's, which draws a weight: here TypeError, as that would write over the codes."""
        raise TypeError(
            "Linear4bit.reset_parameters: expected a layer with a float weight, got codes (quantize_ sets it)"
        )

    def _multiply(self, op: Any, x: Tensor, *more: Any) -> Any:
        """The op on x and the weight. No QuantState is made: it costs as much time as one row of a small layer."""
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.in_features,) or x.dtype is torch.uint8:
            name = op.name().removeprefix("qlora_ext::")
            functional.check_matrix(name, self.state, x)  # says what is wrong with x, if it is not this:
            why = "; a model that casts to a layer's weight.dtype needs the layer in quantize_model's skip"
            raise TypeError(f"{name}: x: expected dtype float32, float16 or bfloat16, got {x.dtype}{why}")
        x = functional.cast_as_autocast(x)
        return op(x, *self._tensors(), self.quant_type, self.blocksize, self.out_features, self.bias, *more)


def dense(layer: nn.Linear | Weight4bit, weight: Tensor) -> nn.Linear:
    """The layer with this float weight [out, in], frozen, in its dtype; a 4-bit or parametrized one as what it was."""
    kind, dtype = dense_class(layer), layer.dtype if isinstance(layer, Weight4bit) else layer.weight.dtype
    if not isinstance(layer, Weight4bit) and "weight" in layer._parameters:
        linear = shallow_copy(layer)  # a subclass may compute in its own way
    else:
        linear = new_dense(kind, *out_and_in(layer), layer.bias).train(layer.training)
    linear.weight = nn.Parameter(oriented(kind, weight).to(dtype).contiguous(), requires_grad=False)
    return linear
