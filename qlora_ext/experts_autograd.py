"""The gradients of the ops of experts: for x and the adapters, never for the 4-bit weight.

In Python, unlike those of linear layers (csrc/ops/autograd.cpp): one call is for all experts of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from qlora_ext._ops import ops

Gradients = tuple[Any, ...]


def check_no_tangents(op: str, *tensors: Tensor | None) -> None:
    """RuntimeError if one has a tangent, of forward mode AD, which would be lost."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(f"{op}: forward mode AD: expected tensors without tangents, got one with")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    x, *weight, quant_type, blocksize, offs, _, is_transposed = inputs[:10]
    ctx.kind, ctx.is_transposed, ctx.in_features = (quant_type, blocksize), is_transposed, x.shape[1]
    ctx.set_materialize_grads(False)
    tensors = [*weight, offs]
    if isinstance(output, tuple):
        A, B, ctx.scaling = inputs[10:]
        # x's values are for the gradient of A alone: where none trains, one number is kept in the shape of x.
        ctx.trains_A = any(a.requires_grad for a in A)
        if ctx.trains_A:  # else the gradient of B, where it is differentiated, leads to x through x A^T
            ctx.mark_non_differentiable(output[1])
        tensors += [x if ctx.trains_A else x.new_empty(()).expand(x.shape), output[1], *A, *B]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor | None) -> Gradients:
    *weight, offs = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    check_no_tangents("experts_4bit", grad)
    grad_x = ops.experts_4bit(grad, *weight, *ctx.kind, offs, ctx.in_features, not ctx.is_transposed)
    return (grad_x, *[None] * 9)


def _lora_backward(ctx: Any, grad: Tensor | None, grad_xA: Tensor | None) -> Gradients:
    """From the gradient of y, and that of xA where a gradient of B has been differentiated."""
    packed, absmax, nested_absmax, nested_offset, offs, x, xA, *factors = ctx.saved_tensors
    A, B = factors[: len(ctx.scaling)], factors[len(ctx.scaling) :]
    grad_A: list[Any] = []
    grad_B: list[Any] = []
    none = [None] * len(A)
    if grad is None and grad_xA is None:
        return (*[None] * 10, none, none, None)
    check_no_tangents("lora_experts_4bit", grad, grad_xA)
    weight, wants_x = (packed, absmax, nested_absmax, nested_offset, *ctx.kind, offs), ctx.needs_input_grad[0]
    if torch.is_grad_enabled() or grad_xA is not None:  # by products that can be differentiated again, in float32
        grad = x.new_zeros([len(x), B[0].shape[1]]) if grad is None else grad
        grad_xA = torch.zeros_like(xA) if grad_xA is None else grad_xA
        with torch.autocast(grad.device.type, enabled=False):
            own_x = x if ctx.trains_A else None
            grad_x, grad_A, grad_B = _differentiable(grad, grad_xA, own_x, xA, offs, A, B, ctx.scaling)
        if wants_x:
            grad_x = grad_x + ops.experts_4bit(grad.float(), *weight, ctx.in_features, not ctx.is_transposed)
    else:
        wanted = [wants_x, *map(any, ctx.needs_input_grad[10:12])]
        gradients = ops.lora_experts_4bit_backward(grad, x, xA, *weight, ctx.is_transposed, A, B, ctx.scaling, *wanted)
        grad_x, grad_A, grad_B = gradients
    return (grad_x if wants_x else None, *[None] * 9, grad_A or none, grad_B or none, None)


def _differentiable(
    grad: Tensor,
    grad_xA: Tensor,
    x: Tensor | None,
    xA: Tensor,
    offs: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    scaling: list[float],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What adapters add to the gradient of x, and the gradients of A, if x is given, and B."""
    ends = offs.tolist()
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def of_experts(rows: Tensor) -> list[Tensor]:
        return list(rows[: ends[-1]].float().split(counts))

    ranks, grads, xs = [a.shape[1] for a in A], of_experts(grad), [] if x is None else of_experts(x)
    added, all_A, all_B = grad.new_zeros([len(grad), A[0].shape[2]], dtype=torch.float32), [], []
    for a, b, scale, own_xA, own_grad_xA in zip(
        A, B, scaling, xA.split(ranks, 1), grad_xA.split(ranks, 1), strict=True
    ):
        a, b = a.float(), b.float()
        low_rank = of_experts(own_xA) if x is None else [rows @ a[i].T for i, rows in enumerate(xs)]
        g = [
            rows * scale @ b[i] + more
            for i, (rows, more) in enumerate(zip(grads, of_experts(own_grad_xA), strict=True))
        ]
        parts = torch.cat([each @ a[i] for i, each in enumerate(g)])
        added = added + F.pad(parts, (0, 0, 0, len(added) - len(parts)))
        if x is not None:
            all_A.append(torch.stack([each.T @ rows for each, rows in zip(g, xs, strict=True)]))
        all_B.append(torch.stack([rows.T * scale @ each for rows, each in zip(grads, low_rank, strict=True)]))
    return added, all_A, all_B


torch.library.register_autograd("qlora_ext::experts_4bit", _backward, setup_context=_save)
torch.library.register_autograd("qlora_ext::lora_experts_4bit", _lora_backward, setup_context=_save)
