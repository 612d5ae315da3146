"""Experts4bit: the weights of fused experts, a tensor [experts, out, in] of a mixture's model, in 4 bits.

The models of transformers keep them so. Their own forward ("eager") multiplies by the matrices of those experts alone
that have tokens: `F.linear(x, weight[i])`, or `x @ weight[i]` where they are [experts, in, out]. Each is one op here,
which decodes the matrix inside the multiply; what the model does around them remains its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_ext._ops import NESTED_BLOCKSIZE, ops
from qlora_ext.functional import cast_as_autocast
from qlora_ext.linear import Linear4bit


class Experts4bit(nn.Module):
    """A frozen weight of several matrices of one shape in 4 bits, for products with one of them at a time.

    `F.linear(x, experts[i], bias)` is `F.linear(x, weight[i], bias)`, and `x @ experts[i]` is `x @ weight[i]`, with
    gradients for x and bias.

    Args:
        weight: float32, float16 or bfloat16 [experts, rows, columns] (on "meta": this is on "meta" too).
        quant_type, blocksize: as for `quantize_4bit`.
        double_quant: absmax in 8 bits, where a matrix has whole groups of 256 of them.

    Attributes:
        shape: of the weight.
        stack: a Linear4bit that holds all matrices, one below the other.

    Raises:
        TypeError, ValueError: as Linear4bit, or a block would reach from one matrix into the next.
    """

    def __init__(
        self, weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
    ) -> None:
        super().__init__()
        self.shape = weight.shape
        experts, rows, columns = weight.shape
        self.stack = Linear4bit(
            columns,
            experts * rows,
            bias=False,
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            dtype=weight.dtype,
            device="meta",
        )
        if rows * columns % blocksize != 0:
            expected = f"matrices of whole blocks of {blocksize} elements"
            raise ValueError(f"Experts4bit: weight: expected {expected}, got {rows} x {columns}")
        if rows * columns % (blocksize * NESTED_BLOCKSIZE) != 0:
            self.stack.double_quant = False
        self.quantize_(weight)

    def quantize_(self, weight: Tensor) -> None:
        """Replace the weight, on that tensor's device; raises as Linear4bit.quantize_."""
        if weight.shape != self.shape:
            raise ValueError(f"Experts4bit: weight: expected shape {list(self.shape)}, got {list(weight.shape)}")
        self.stack.quantize_(weight.flatten(0, 1))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [experts, rows, columns] in `dtype` (None: that of the original)."""
        return self.stack.dequantize(dtype).view(self.shape)

    def __getitem__(self, index: int | Tensor) -> Matrix4bit:
        """One matrix, as an argument of products."""
        state, i = self.stack.state, int(index)
        tensors = (self.stack.weight, state.absmax, state.nested_absmax)
        parts = [None if t is None else t.view(self.shape[0], -1, *t.shape[1:])[i] for t in tensors]
        return Matrix4bit(self.shape[1:], *parts, state.nested_offset, state.quant_type, state.blocksize)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}"


class Matrix4bit:
    """A matrix in 4 bits, by the arguments with which the ops take it, for torch's products to take."""

    def __init__(self, shape: torch.Size, *weight: Any) -> None:
        self.rows, self.columns = shape
        self.weight = weight

    def float(self) -> Matrix4bit:
        """Itself: products decode it to the dtype of their other argument."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = PRODUCTS.get(func)
        if product is None or any(isinstance(first, cls) for first in args[:1]):
            return NotImplemented
        return product(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Matrix4bit, bias: Tensor | None = None) -> Tensor:
    y: Tensor = ops.linear_4bit(cast_as_autocast(input), *weight.weight, weight.rows, bias)
    return y


def _matmul(input: Tensor, other: Matrix4bit) -> Tensor:
    y: Tensor = Matmul4bit.apply(cast_as_autocast(input), other)
    return y


PRODUCTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
}


class Matmul4bit(torch.autograd.Function):
    """x @ W: what the backward of F.linear computes, whose forward is the gradient of this."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Matrix4bit) -> Tensor:
        tensors, ctx.options, ctx.rows = other.weight[:4], other.weight[4:], other.rows
        ctx.save_for_backward(*tensors)
        y: Tensor = ops.linear_4bit_dgrad(x, *other.weight, other.columns)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ops.linear_4bit(grad, *ctx.saved_tensors, *ctx.options, ctx.rows, None), None


def fused_experts(module: nn.Module) -> list[str]:
    """The attributes in which a module of transformers has the weights of fused experts, if its own forward uses their
    matrices one by one: its `use_experts_implementation` marks those modules by attributes that it gives them."""
    if not (hasattr(module, "is_transposed") and hasattr(getattr(module, "config", None), "_experts_implementation")):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, weight in own if weight.dim() == 3 and weight.is_floating_point()]


def quantize_experts(module: nn.Module, name: str, **options: Any) -> None:
    """Put Experts4bit in the place of such a weight. The module's own forward computes with them from now on."""
    experts = Experts4bit(module.get_parameter(name), **options).train(module.training)
    delattr(module, name)
    setattr(module, name, experts)
    module.config._experts_implementation = "eager"  # type: ignore[union-attr]


def dequantize_experts(module: nn.Module) -> None:
    """The inverse, for each of the module's Experts4bit; the forward remains."""
    for name, experts in list(module.named_children()):
        if isinstance(experts, Experts4bit):
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(experts.dequantize(), requires_grad=False))
