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


def check_no_tangents(op: str, *tensors: Tensor) -> None:
    """RuntimeError if one has a tangent, of forward mode AD, which would be lost."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"{op}: forward mode AD: expected tensors without tangents, got one with")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    x, *weight, quant_type, blocksize, offs, _, is_transposed = inputs[:10]
    ctx.kind, ctx.is_transposed, ctx.in_features = (quant_type, blocksize), is_transposed, x.shape[1]
    ctx.set_materialize_grads(False)
    tensors = [*weight, offs]
    if isinstance(output, tuple):
        A, B, ctx.scaling = inputs[10:]
        xA = output[1]
        ctx.mark_non_differentiable(xA)
        tensors += [x, xA, *A, *B]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor | None) -> Gradients:
    *weight, offs = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    check_no_tangents("experts_4bit", grad)
    grad_x = ops.experts_4bit(grad, *weight, *ctx.kind, offs, ctx.in_features, not ctx.is_transposed)
    return (grad_x, *[None] * 9)


def _lora_backward(ctx: Any, grad: Tensor | None, _: None) -> Gradients:
    packed, absmax, nested_absmax, nested_offset, offs, x, xA, *factors = ctx.saved_tensors
    A, B = factors[: len(ctx.scaling)], factors[len(ctx.scaling) :]
    if grad is None:
        return (*[None] * 10, [None] * len(A), [None] * len(B), None)
    check_no_tangents("lora_experts_4bit", grad)
    weight, wants_x = (packed, absmax, nested_absmax, nested_offset, *ctx.kind, offs), ctx.needs_input_grad[0]
    if torch.is_grad_enabled():  # create_graph: by products that can be differentiated again, in float32
        with torch.autocast(grad.device.type, enabled=False):
            grad_x, grad_A, grad_B = _differentiable(grad.float(), x.float(), offs, A, B, ctx.scaling)
        if wants_x:
            grad_x = grad_x + ops.experts_4bit(grad.float(), *weight, ctx.in_features, not ctx.is_transposed)
    else:
        gradients = ops.lora_experts_4bit_backward(grad, x, xA, *weight, ctx.is_transposed, A, B, ctx.scaling, wants_x)
        grad_x, grad_A, grad_B = gradients
    return (grad_x if wants_x else None, *[None] * 9, grad_A, grad_B, None)


def _differentiable(
    grad: Tensor, x: Tensor, offs: Tensor, A: list[Tensor], B: list[Tensor], scaling: list[float]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What adapters add to the gradient of x, and the gradients of A and B."""
    ends = offs.tolist()
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    rows = list(zip(grad[: ends[-1]].split(counts), x[: ends[-1]].split(counts), strict=True))
    added, all_A, all_B = torch.zeros_like(x), [], []
    for a, b, scale in zip(A, B, scaling, strict=True):
        a, b = a.float(), b.float()
        g = [own * scale @ b[i] for i, (own, _) in enumerate(rows)]
        parts = torch.cat([each @ a[i] for i, each in enumerate(g)])
        added = added + F.pad(parts, (0, 0, 0, len(x) - len(parts)))
        all_A.append(torch.stack([each.T @ own_x for each, (_, own_x) in zip(g, rows, strict=True)]))
        all_B.append(torch.stack([own.T * scale @ (own_x @ a[i].T) for i, (own, own_x) in enumerate(rows)]))
    return added, all_A, all_B


torch.library.register_autograd("qlora_ext::experts_4bit", _backward, setup_context=_save)
torch.library.register_autograd("qlora_ext::lora_experts_4bit", _lora_backward, setup_context=_save)
