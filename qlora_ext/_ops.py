"""Loads the compiled module and tells torch what the ops need beside their kernels: shapes (fake) and gradients.

Autograd is in Python: 45 us a call against 17 in C++, under 1 % of a training step.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

try:
    from qlora_ext import _C
except ImportError as error:
    raise ImportError(
        "qlora_ext: its compiled module _C does not load. Build it with `pip install --no-build-isolation -e .` "
        f"under the installed torch {torch.__version__}. The reason: {error}"
    ) from error

ops = torch.ops.qlora_ext
codebook = _C.codebook


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# --- shapes ----------------------------------------------------------------------------------------------------------


def _same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """A meta tensor among real ones reaches these functions instead of a kernel: that is an error, not a shape."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name}: expected device {first.device}, got {tensor.device}")


@torch.library.register_fake("qlora_ext::quantize_4bit")
def _(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    def layout(per: int) -> list[int]:
        if weight.dim() == 0 or weight.size(-1) % blocksize:
            return [ceil_div(weight.numel(), per)]
        return [*weight.shape[:-1], weight.shape[-1] // per]

    packed = weight.new_empty(layout(2), dtype=torch.uint8)
    return packed, weight.new_empty(layout(blocksize), dtype=torch.float32)


@torch.library.register_fake("qlora_ext::quantize_absmax")
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = ceil_div(absmax.numel(), 256)
    codes = torch.empty_like(absmax, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return codes, absmax.new_empty([groups]), absmax.new_empty([])


@torch.library.register_fake("qlora_ext::dequantize_4bit")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    _same_device("dequantize_4bit", packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset)
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qlora_ext::linear_4bit")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _same_device("linear_4bit", x, packed=packed, **scales, bias=bias)
    return x.new_empty([*x.shape[:-1], out_features])


@torch.library.register_fake("qlora_ext::linear_4bit_dgrad")
def _(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    in_features: int,
) -> Tensor:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _same_device("linear_4bit_dgrad", grad, packed=packed, **scales)
    return grad.new_empty([*grad.shape[:-1], in_features])


@torch.library.register_fake("qlora_ext::lora_linear_4bit")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    out_features: int,
    bias: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    scaling: list[float],
    dropout_mask: list[Tensor],
) -> tuple[Tensor, Tensor]:
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    _same_device("lora_linear_4bit", x, packed=packed, **scales, bias=bias)
    for name, tensors in (("A", A), ("B", B), ("dropout_mask", dropout_mask)):
        for tensor in tensors:
            _same_device("lora_linear_4bit", x, **{name: tensor})
    y = x.new_empty([*x.shape[:-1], out_features])
    return y, x.new_empty([prod(x.shape[:-1]), sum(a.shape[0] for a in A)])


# --- gradients -------------------------------------------------------------------------------------------------------


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, nested_absmax, nested_offset, ctx.quant_type, ctx.blocksize, _, bias = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _bias_grad(ctx: Any, grad: Tensor) -> Tensor:
    return _rows(grad).sum(0, dtype=torch.float32).to(ctx.bias_dtype)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = ctx.saved_tensors
        grad_x = ops.linear_4bit_dgrad(grad, *weight, ctx.quant_type, ctx.blocksize, ctx.in_features)
    if ctx.needs_input_grad[8]:
        grad_bias = _bias_grad(ctx, grad)
    return grad_x, None, None, None, None, None, None, None, grad_bias


torch.library.register_autograd("qlora_ext::linear_4bit", _linear_backward, setup_context=_save_linear)


def _save_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, ctx.quant_type, ctx.blocksize, _, bias, A, B, scaling, dropout_mask = inputs
    ctx.save_for_backward(x, output[1], *weight, *A, *B, *dropout_mask)
    ctx.scaling = scaling
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _lora_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    """With g_i = scaling_i grad B_i:  dx = grad W + sum_i mask_i * (g_i A_i),  dA_i = g_i^T (x * mask_i),
    dB_i = scaling_i grad^T xA_i. Without masks the adapters go through one multiply side by side."""
    x, xA, *rest = ctx.saved_tensors
    count = len(ctx.scaling)
    weight, A, B, masks = rest[:4], rest[4 : 4 + count], rest[4 + count : 4 + 2 * count], rest[4 + 2 * count :]
    ranks = [a.shape[0] for a in A]
    # All in the dtype of x; the gradients of the fp32 adapters are cast once at the end.
    rows, grad_rows = _rows(x), _rows(grad)
    stacked_A = torch.cat(A).to(x.dtype)
    scaled_B = torch.cat([b * s for b, s in zip(B, ctx.scaling, strict=True)], 1).to(x.dtype)
    g = grad_rows @ scaled_B  # [M, sum r]

    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ops.linear_4bit_dgrad(grad_rows, *weight, ctx.quant_type, ctx.blocksize, rows.shape[-1])
        if masks:
            for g_i, a, mask in zip(g.split(ranks, 1), stacked_A.split(ranks), masks, strict=True):
                grad_x.addcmul_(g_i @ a, mask.reshape(rows.shape))
        else:
            grad_x.addmm_(g, stacked_A)
        grad_x = grad_x.reshape(x.shape)
    if ctx.needs_input_grad[8]:
        grad_bias = _bias_grad(ctx, grad)
    if masks:
        grad_A = [
            g_i.t() @ (rows * mask.reshape(rows.shape)) for g_i, mask in zip(g.split(ranks, 1), masks, strict=True)
        ]
    else:
        grad_A = list((g.t() @ rows).split(ranks))
    grad_B = [part * s for part, s in zip((grad_rows.t() @ xA).split(ranks, 1), ctx.scaling, strict=True)]
    grad_A = [d.to(a.dtype) for d, a in zip(grad_A, A, strict=True)]
    grad_B = [d.to(b.dtype) for d, b in zip(grad_B, B, strict=True)]
    no_grad = [None] * len(masks)
    return grad_x, None, None, None, None, None, None, None, grad_bias, grad_A, grad_B, None, no_grad


torch.library.register_autograd("qlora_ext::lora_linear_4bit", _lora_backward, setup_context=_save_lora)
